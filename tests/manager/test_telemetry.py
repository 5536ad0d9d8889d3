"""Events, log records, spans and traces."""

from __future__ import annotations

import json
import logging
import threading
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest

from asyncdcp import EverySteps, KeepLast, Options, Telemetry
from asyncdcp.errors import InvalidOption, SaveSkipped
from asyncdcp.manager import Event
from asyncdcp.runs import look
from asyncdcp.storage import LocalPlace
from tests.manager.conftest import Opened, Training, save_all
from tests.work import LONG


def test_events_come_in_order_with_their_numbers(opened: Opened, training: Training) -> None:
    events: list[Event] = []
    with opened(keep=KeepLast(1), telemetry=Telemetry(on_event=events.append)) as manager:
        manager.restore_latest(training.state).result()
        save_all(manager, training, 1, metrics={"loss": 0.5})
        save_all(manager, training, 2)
    assert manager._engine._callbacks.join(10)
    assert [(event.kind, event.step) for event in events] == [
        ("opened", None), ("save", 1), ("committed", 1), ("save", 2), ("committed", 2), ("deleted", 1),
        ("closed", None),
    ]  # fmt: skip
    committed = events[2].fields
    assert committed["metrics"] == {"loss": 0.5} and committed["tensor_bytes"] == 128
    assert 0 < committed["staged_seconds"] <= committed["durable_seconds"]


def test_a_save_that_is_skipped_has_not_failed(
    opened: Opened, training: Training, caplog: pytest.LogCaptureFixture
) -> None:
    events: list[Event] = []
    options = Options(when_busy="skip")
    manager = opened(options=options, telemetry=Telemetry(on_event=events.append))
    release = threading.Event()
    manager._checkpointer._engine.call(release.wait, 30)  # the first save is under way until then
    manager.save(1, training.at(1))
    with pytest.raises(SaveSkipped):
        manager.save(2, training.state).result()
    release.set()
    manager.close()
    assert manager._engine._callbacks.join(10)
    assert [(event.kind, event.step) for event in events if event.kind in ("skipped", "failed")] == [("skipped", 2)]
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_who_watches_is_called_in_the_context_of_the_save_and_apart_from_the_managers_work(
    opened: Opened, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tracer that takes its time holds nothing up but what comes after it."""
    step: ContextVar[int] = ContextVar("step", default=0)
    seen: list[tuple[str, int]] = []
    release = threading.Event()
    manager = opened(telemetry=Telemetry(on_event=lambda event: seen.append((event.kind, step.get()))))

    def trace(number: int, result: object) -> None:
        assert release.wait(30)
        seen.append(("traced", step.get()))

    monkeypatch.setattr(manager._reporter, "trace_save", trace)
    for number in (1, 2):
        token = step.set(number)
        manager.save(number, training.at(number)).result()
        step.reset(token)
    assert manager.steps().result(30) == [1, 2]
    release.set()
    manager.close()
    assert manager._engine._callbacks.join(10)
    assert [each for each in seen if each[0] in ("committed", "traced")] == [
        ("committed", 1), ("traced", 1), ("committed", 2), ("traced", 2),
    ]  # fmt: skip


def test_why_a_save_failed_is_told_even_where_somebody_has_seen_it_before(opened: Opened, training: Training) -> None:
    events: list[Event] = []
    release = threading.Event()
    with opened(telemetry=Telemetry(on_event=events.append)) as manager:
        manager._checkpointer._engine.call(release.wait, LONG)  # else it may be durable before it is cancelled
        last = manager.save(2, training.at(2))
        last.cancel()
        release.set()
        assert last.exception() is not None
    assert manager._engine._callbacks.join(10)
    (failed,) = (event for event in events if event.kind == "failed")
    assert failed.step == 2 and "was cancelled" in failed.fields["cause"]


def test_log_records_carry_fields(opened: Opened, training: Training, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "asyncdcp.manager"):
        save_all(opened(), training, 7)
    (record,) = (each for each in caplog.records if getattr(each, "asyncdcp", {}).get("event") == "committed")
    fields = vars(record)["asyncdcp"]
    assert (fields["step"], fields["tensor_bytes"], record.levelname) == (7, 128, "INFO")


def test_a_listener_that_fails_harms_nobody(opened: Opened, training: Training) -> None:
    called = threading.Event()

    def fail(event: Event) -> None:
        called.set()
        raise ValueError("not today")

    manager = opened(telemetry=Telemetry(on_event=fail))
    save_all(manager, training, 1)
    assert called.wait(LONG) and manager.steps().result() == [1]
    manager.close()
    assert manager._engine._callbacks.join(LONG)  # what it logs is not said while another test looks


async def test_a_trace_of_every_save_is_written(opened: Opened, training: Training, run: Path) -> None:
    with opened(telemetry=Telemetry(traces=True), save_when=EverySteps(1)) as manager:
        save_all(manager, training, 1, 2)
    traces = sorted((run / "traces").iterdir())
    assert [path.name.split("-")[0] for path in traces] == ["step_1", "step_2"]
    events = json.loads(traces[0].read_bytes())["traceEvents"]
    assert {"stage", "transform", "write", "sync", "commit"} <= {event["name"] for event in events}
    assert all(event["dur"] >= 0 <= event["ts"] for event in events if event["ph"] == "X")
    assert (await look(LocalPlace(run))).steps() == [1, 2]


def test_open_telemetry_gets_a_span_for_each_save(opened: Opened, training: Training) -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter = memory.InMemorySpanExporter()
    provider = sdk.TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    with opened(telemetry=Telemetry(tracer=provider.get_tracer("test"))) as manager:
        save_all(manager, training, 7)
    spans: dict[str, Any] = {span.name: span for span in exporter.get_finished_spans()}
    whole = spans.pop("save step 7")
    assert whole.attributes["asyncdcp.tensor_bytes"] == 128 and {"stage", "write", "commit"} <= set(spans)
    for span in spans.values():
        assert span.parent.span_id == whole.context.span_id
        assert whole.start_time <= span.start_time <= span.end_time <= whole.end_time


def test_a_tracer_that_fails_harms_nobody(opened: Opened, training: Training, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def start_span(self, *_: Any, **__: Any) -> Any:
            raise ValueError("not today")

    with opened(telemetry=Telemetry(tracer=Broken())) as manager:
        save_all(manager, training, 1)
    assert "the tracer failed on the save of step 1" in caplog.text


def test_wrong_listeners_are_refused() -> None:
    for wrong in ({"on_event": 3}, {"tracer": object()}):
        with pytest.raises(InvalidOption):
            Telemetry(**wrong)
