"""Damage is found, whatever and wherever it is."""

from __future__ import annotations

import pytest

from asyncdcp import envelope
from asyncdcp.pipeline import windows
from tests.reliability.corruption import examine
from tests.reliability.power import Figures
from tests.reliability.worlds import Lost


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_damage_is_found(ranks: int) -> None:
    figures = Figures()
    examine(ranks, samples=100, seed=1, figures=figures)
    assert figures["damages"] > 1000


def test_without_the_blocks_checksums_damage_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows.WindowCheck, "advance", lambda check, there: None)
    with pytest.raises((Lost, AssertionError)):
        examine(1, samples=10, seed=1, figures=Figures())


def test_without_the_digest_of_what_describes_damage_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envelope, "digest", lambda data: "0" * 32)
    with pytest.raises((Lost, AssertionError)):
        examine(1, samples=10, seed=1, figures=Figures())
