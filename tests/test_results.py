"""Results can be logged, copied and sent; progress adds up."""

from __future__ import annotations

import pickle
import threading
from dataclasses import FrozenInstanceError, asdict
from typing import Any

import pytest

from asyncdcp import LoadReport, Progress, SaveResult
from asyncdcp.results import ProgressMeter, frozen
from asyncdcp.trace import Span

RESULT = SaveResult(
    path="/it",
    save_id="0" * 20,
    tensors=2,
    tensor_bytes=1000,
    stored_bytes=5000,
    staged_seconds=0.1,
    durable_seconds=0.5,
    stage_seconds=frozen({"write": 0.2}),
    filesystem="ext4",
)
REPORT = LoadReport("/it", "0" * 20, 2, 1000, 0.25, frozen({"read": 0.2}))


@pytest.mark.parametrize("result", [RESULT, REPORT])
def test_frozen_pickled_and_as_a_dict(result: Any) -> None:
    with pytest.raises(FrozenInstanceError):
        result.path = "/other"
    assert pickle.loads(pickle.dumps(result)) == result  # noqa: S301  # our own bytes
    assert asdict(result)["path"] == "/it"


def test_rates() -> None:
    assert RESULT.bytes_per_second == 2000
    assert REPORT.bytes_per_second == 4000
    empty = LoadReport("/it", "0" * 20, 0, 0, 0.0, {})
    assert empty.bytes_per_second == 0


def test_a_copy_of_the_seconds() -> None:
    seconds = {"write": 1.0}
    copied = frozen(seconds)
    seconds["write"] = 2.0
    assert copied == {"write": 1.0}


def test_progress_adds_up_by_stage_and_never_passes_the_total() -> None:
    seen: list[Progress] = []
    meter = ProgressMeter({"stage": seen.append, "write": seen.append})
    for stage, nbytes in (("stage", 60), ("write", 60), ("commit", 5), ("stage", 0), ("stage", 60), ("verify", 3)):
        meter(Span(stage, 0.0, 1.0, nbytes), 100)
    assert seen == [("stage", 60, 100), ("write", 60, 100), ("stage", 100, 100)]


def test_progress_from_several_threads_is_in_order() -> None:
    seen: list[Progress] = []
    meter = ProgressMeter({"verify": seen.append})

    def work() -> None:
        for _ in range(1000):
            meter(Span("verify", 0.0, 1.0, 1), 4000)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [progress.done for progress in seen] == list(range(1, 4001))
