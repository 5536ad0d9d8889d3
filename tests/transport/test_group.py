"""Real processes on gloo, one world for all: a transfer to several, one that stalls, sides that are killed."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.programs import Programs

WORLD = 3


@pytest.fixture(scope="module")
def results(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder, program = tmp_path_factory.mktemp("world"), str(Path(__file__).with_name("ranks.py"))
    ranks = [programs.start(program, str(rank), str(WORLD), str(folder)) for rank in range(WORLD)]
    ended = [rank.wait(200) for rank in ranks]
    assert [each.returncode for each in ended] == [0, *[-signal.SIGKILL] * (WORLD - 1)], [each.stderr for each in ended]
    return [json.loads(each.stdout.splitlines()[-1]) for each in ended[:-1]]


def test_a_state_goes_to_all_at_once(results: list[Any]) -> None:
    for turn in (1, 2):
        assert results[0][f"digest {turn}"] == results[1][f"digest {turn}"]
        assert results[0][f"digest {turn}"][-3:] == [turn, "x", None]
        assert results[1][f"shared {turn}"] == (turn == 1)


def test_one_that_does_not_come_fails_the_send_within_the_timeout(results: list[Any]) -> None:
    kind, said, seconds = results[0]["stall"]
    assert kind == "PeerFailed"
    assert "sending the offer of the state: rank 1 did nothing for 0.5 s (timeout=)" in said
    assert 0.4 < seconds < 10


def test_one_that_is_killed_fails_the_send_by_name_and_nobody_else(results: list[Any]) -> None:
    kind, rank, tensors, said = results[0]["kill"]
    assert (kind, rank) == ("PeerFailed", WORLD - 1)
    assert tensors in (["w"], [])
    assert "is gone" in said
    assert results[0]["seconds"] < 25, "it is seen at once, not by the timeout"
    assert results[1]["kill"] is True


def test_a_sender_that_is_killed_fails_the_receive_by_name(results: list[Any]) -> None:
    found = results[0]["sender killed"]
    assert (found["kind"], found["rank"], found["tensors"]) == ("PeerFailed", 1, ["w"])
    assert "receiving w: rank 1 is gone" in found["said"]
    assert found["seconds"] < 25, "it is seen at once, not by the timeout"
