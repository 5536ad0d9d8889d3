"""What a manager does, for people and machines: log records with fields, a callback, OpenTelemetry spans, traces."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from asyncdcp.config import check_flags
from asyncdcp.engine import Engine
from asyncdcp.errors import InvalidOption
from asyncdcp.results import SaveResult
from asyncdcp.runs.history import stage_times

_logger = logging.getLogger("asyncdcp.manager")

Kind: TypeAlias = Literal[
    "opened",
    "settled",
    "restored",
    "fallback",
    "foreign",
    "save",
    "committed",
    "mirrored",
    "fetched",
    "skipped",
    "failed",
    "deleted",
    "fenced",
    "preempted",
    "closed",
]

_LEVELS: Mapping[str, int] = MappingProxyType(
    {
        "fallback": logging.ERROR,
        "failed": logging.ERROR,
        "fenced": logging.ERROR,
        "preempted": logging.WARNING,
        "foreign": logging.WARNING,
        "fetched": logging.WARNING,
    }
)


class Event(NamedTuple):
    """Something that happened to a run. ``step`` where it concerns one; ``fields`` are plain values, by kind."""

    kind: Kind
    run: str
    step: int | None
    fields: Mapping[str, Any]


class Tracer(Protocol):
    """What is used of an ``opentelemetry.trace.Tracer``."""

    def start_span(
        self, name: str, *, context: Any = None, attributes: Any = None, start_time: int | None = None
    ) -> Any:
        """A span that begins at ``start_time``, in nanoseconds since the epoch."""
        ...


@dataclass(frozen=True, kw_only=True)
class Telemetry:
    """Who hears of a manager's doings. They are logged in any case, to the logger "asyncdcp.manager": each record has
    the event's fields as its attribute ``asyncdcp``.

    ``on_event`` is called with each ``Event``, one after another, on a thread of its own. ``traces=True`` writes a
    Chrome trace of every save into the run's ``traces``. ``tracer`` is an OpenTelemetry tracer, which gets a span for
    every save and in it one for each of its stages.

    >>> events = []
    >>> telemetry = asyncdcp.Telemetry(on_event=lambda event: events.append(event.kind))
    >>> with asyncdcp.CheckpointManager("runs/told", process=False, telemetry=telemetry) as manager:
    ...     _ = manager.save(1, {"weight": torch.ones(2)})
    >>> [kind for kind in events if kind in ("save", "committed")]
    ['save', 'committed']
    """

    on_event: Callable[[Event], object] | None = None
    traces: bool = False
    tracer: Tracer | None = None

    def __post_init__(self) -> None:
        check_flags(traces=self.traces)
        if self.on_event is not None and not callable(self.on_event):
            raise InvalidOption(f"on_event takes a function of an Event, not {self.on_event!r}")
        if self.tracer is not None and not hasattr(self.tracer, "start_span"):
            raise InvalidOption(f"tracer takes an OpenTelemetry tracer, not {self.tracer!r}")


class Reporter:
    """Tells all that listen; ``on_event`` on the engine's callback thread, in the order of events."""

    def __init__(self, telemetry: Telemetry | None, run: str, engine: Engine) -> None:
        if not isinstance(telemetry, Telemetry | None):
            raise InvalidOption(
                f"telemetry takes a Telemetry, such as Telemetry(on_event=print), not {telemetry!r:.80}"
            )
        self.telemetry = telemetry or Telemetry()
        self._run = run
        self._engine = engine

    def emit(self, kind: Kind, message: str, step: int | None = None, **fields: Any) -> None:
        """Logs an event and hands it on; from any thread, and without waiting."""
        extra = {"event": kind, "run": self._run, "step": step, **fields}
        _logger.log(_LEVELS.get(kind, logging.INFO), "%s: %s", self._run, message, extra={"asyncdcp": extra})
        listener = self.telemetry.on_event
        if listener is not None:
            event = Event(kind, self._run, step, fields)
            self._engine.schedule(copy_context(), partial(listener, event))

    def trace_save(self, step: int, result: SaveResult) -> None:
        """Gives the tracer a committed save; what is wrong with the tracer is logged, and harms nothing else."""
        if self.telemetry.tracer is None or not result.spans:
            return
        try:
            record_spans(self.telemetry.tracer, f"save step {step}", step, result)
        except Exception:
            _logger.exception("the tracer failed on the save of step %d", step)


def record_spans(tracer: Tracer, name: str, step: int, result: SaveResult) -> None:
    """A span from the first to the last moment of a save, and one below it for each stage."""
    from opentelemetry.trace import set_span_in_context  # it is there: somebody has made the tracer with it

    since_epoch = time.time_ns() - time.monotonic_ns()

    def nanoseconds(moment: float) -> int:
        return since_epoch + int(moment * 1e9)

    begin, end = min(span.start for span in result.spans), max(span.end for span in result.spans)
    about = {"asyncdcp.step": step, "asyncdcp.path": result.path, "asyncdcp.save_id": result.save_id}
    sizes = {"asyncdcp.tensor_bytes": result.tensor_bytes, "asyncdcp.stored_bytes": result.stored_bytes}
    whole = tracer.start_span(name, attributes={**about, **sizes}, start_time=nanoseconds(begin))
    context = set_span_in_context(whole)
    for stage, time_of in stage_times(result.spans).items():
        moment, sizes = nanoseconds(begin + time_of.begin), {"asyncdcp.bytes": time_of.bytes}
        part = tracer.start_span(stage, context=context, attributes=sizes, start_time=moment)
        part.end(end_time=nanoseconds(begin + time_of.end))
    whole.end(end_time=nanoseconds(end))
