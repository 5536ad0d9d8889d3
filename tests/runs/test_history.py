"""A run's history: what is appended is read back, and what is damaged costs no other line."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from asyncdcp.envelope import Seal
from asyncdcp.extensions import AESGCM, ExtensionRegistry
from asyncdcp.extensions.chain import Chain
from asyncdcp.runs.history import Saved, append_history, open_history
from asyncdcp.runs.layout import HISTORY
from asyncdcp.storage import MemoryPlace, Place

KEY = b"k" * 32


def saved(step: int) -> Saved:
    return Saved(step=step, term=1, save_id=f"{step:020}", time=1e9)


DAMAGED = {
    "cut off": lambda line: line[:-5],
    "no text": lambda line: line.replace(b'"save_id":"0', b'"save_id":"\xff'),
    "nested without end": lambda line: b'{"x":' + b"[" * 100_000,
    "of another kind": lambda line: b"[1, 2]",
    "empty": lambda line: b"",
}


@pytest.mark.parametrize("kind", DAMAGED)
async def test_a_damaged_line_is_passed_over(kind: str) -> None:
    damage: Callable[[bytes], bytes] = DAMAGED[kind]
    place = MemoryPlace("run")
    await append_history(place, saved(1))
    await place.append(HISTORY, damage(msgspec.json.encode(saved(2))))
    await append_history(place, saved(3))
    found = await open_history(place)
    assert ([line.step for line in found.saves], found.sealed) == ([1, 3], 0)


async def test_a_sealed_line_that_is_damaged_is_counted() -> None:
    place, chain = MemoryPlace("run"), Chain([AESGCM(KEY, hide_metadata=True)])
    await append_history(place, saved(1), chain)
    line = msgspec.json.decode(await place.storage.get(HISTORY, 1 << 20))
    await place.append(HISTORY, msgspec.json.encode({**line, "save_id": f"{2:020}"}))  # as if of another save
    found = await open_history(place, ExtensionRegistry([AESGCM(KEY)]))
    assert ([line.step for line in found.saves], found.sealed) == ([1], 1)


class Sealing:
    """A chain whose sealing notes the thread that it is done on."""

    def __init__(self) -> None:
        self.threads: list[int] = []

    def sealer(self, save_id: str) -> Callable[[bytes, str], tuple[Seal, bytes]]:
        def seal(body: bytes, name: str) -> tuple[Seal, bytes]:
            self.threads.append(threading.get_ident())
            return Seal("test", "", True), body

        return seal


async def test_sealing_holds_up_no_loop_and_lines_keep_their_order(place: Place) -> None:
    chain: Any = Sealing()
    for step in range(5):
        await append_history(place, saved(step), chain)
    lines = (await place.storage.get(HISTORY, 1 << 20)).splitlines()
    assert [msgspec.json.decode(line)["save_id"] for line in lines] == [f"{step:020}" for step in range(5)]
    assert len(chain.threads) == 5 and threading.get_ident() not in chain.threads
