"""The soak for some seconds with small tensors: it passes as things are, and finds what leaks."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from tests.reliability import soak
from tests.reliability.power import Figures
from tests.reliability.soak import Both, Soak, Usage
from tests.reliability.worlds import Lost

SECONDS = 1.0
MIB = 1 << 20


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "ELEMENTS", 10_000)


class Leaking(Soak):
    """Keeps 4 MiB of every round."""

    def _round(self, *, full: bool) -> None:
        super()._round(full=full)
        self.__dict__.setdefault("kept", []).append(bytearray(b"x") * (4 * MIB))


def test_nothing_grows(tmp_path: Path) -> None:
    figures = Figures()
    Soak(tmp_path, 1, figures).run(SECONDS, warm_up=10)
    assert figures["saves"] >= 10 and figures["loads"] >= 10


def test_a_leak_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "_GROWTH", 2 * MIB)  # on a busy machine there may be time for one round alone
    with pytest.raises(Lost, match="the trainer grows"):
        Leaking(tmp_path, 1, Figures()).run(SECONDS, warm_up=10)


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (Usage(9, 5, 49 * MIB), "the worker grows"),
        (Usage(12, 5, 40 * MIB), "the worker leaks"),
        (Usage(9, 8, 40 * MIB), "the worker leaks"),
    ],
)
def test_a_background_process_that_grows_is_found(now: Usage, said: str) -> None:
    trainer, before = Usage(16, 15, 300 * MIB), Usage(9, 5, 40 * MIB)
    with pytest.raises(Lost, match=said):
        Both(trainer, now, 7).check(Both(trainer, before, 7))


def test_another_background_process_is_found() -> None:
    usage = Usage(9, 5, 40 * MIB)
    with pytest.raises(Lost, match="another one: 7 at first, 8 now"):
        Both(usage, usage, 8).check(Both(usage, usage, 7))


def test_what_is_in_use_is_counted() -> None:
    before = Usage.of(os.getpid())
    with mmap.mmap(-1, 16 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as kept:  # malloc may have it already
        kept.write(b"x" * len(kept))
        assert Usage.of(os.getpid()).rss - before.rss > len(kept) // 2
