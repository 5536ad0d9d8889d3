"""Damage of every kind to a checkpoint's files: it is found by a load, and by verify, always."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

from asyncdcp.errors import AsyncDCPError, CheckpointNotFound
from asyncdcp.pipeline.verify import verify
from asyncdcp.storage import MemoryStorage
from asyncdcp.trace import Trace
from tests.pipeline.forge import BLOCK
from tests.reliability.power import Figures
from tests.reliability.simulation import simulated
from tests.reliability.worlds import PLACE, Lost, World, version_at
from tests.virtual import run


class Damage(NamedTuple):
    """A change to a file: its content after, None if it is gone.

    A data file's own header is for other tools: a load does not read it (``unread``), and so need not see its damage.
    """

    what: str
    name: str
    content: bytes | None
    unread: bool = False


async def checkpoint(ranks: int = 1) -> dict[str, bytes]:
    """The files of a checkpoint of version 1."""
    world = World(ranks=ranks)
    await world.save()
    return {path.removeprefix(f"{PLACE}/"): data for path, data in world.disk.image().items() if data is not None}


def flips(name: str, data: bytes, positions: range | list[int], bits: tuple[int, ...] = (1, 128)) -> Iterator[Damage]:
    """One bit of one byte."""
    for position in positions:
        for bit in bits:
            changed = bytes([data[position] ^ bit])
            content = data[:position] + changed + data[position + 1 :]
            unread = name.endswith(".safetensors") and position < BLOCK
            yield Damage(f"bit {bit} of byte {position}", name, content, unread)


def resized(name: str, data: bytes) -> Iterator[Damage]:
    """Cut at many places, extended, emptied, gone."""
    for length in {0, 1, 8, BLOCK, len(data) // 2, len(data) - BLOCK, len(data) - 1}:
        if 0 <= length < len(data):
            yield Damage(f"cut to {length}", name, data[:length])
    for more in (b"\0", b" ", b"\n", bytes(BLOCK), data):
        yield Damage(f"extended by {len(more)}", name, data + more)
    yield Damage("gone", name, None)


def swapped(files: dict[str, bytes]) -> Iterator[Damage]:
    """Blocks of a data file exchanged; a file in another's place."""
    for name, data in files.items():
        if name.endswith(".safetensors"):
            blocks = [data[begin : begin + BLOCK] for begin in range(0, len(data) - BLOCK, BLOCK)]
            rest = data[len(blocks) * BLOCK :]
            for first in range(len(blocks) - 1):
                order = [*blocks[:first], blocks[first + 1], blocks[first], *blocks[first + 2 :]]
                yield Damage(f"blocks {first} and {first + 1} swapped", name, b"".join(order) + rest)
            yield Damage("zeroed", name, bytes(len(data)))
        for other, content in files.items():
            if other != name and content != data:
                yield Damage(f"{other} in its place", name, content)


def damages(files: dict[str, bytes], samples: int, rng: random.Random) -> Iterator[Damage]:
    """Every byte of what describes, headers among it; ``samples`` bits of each file's data; every length and swap."""
    for name, data in files.items():
        if name.endswith(".safetensors"):
            yield from flips(name, data, range(0, BLOCK, 1 if samples > 1000 else 16), (1,))
            places = [rng.randrange(len(data)) for _ in range(samples)]
            yield from flips(name, data, places, (1 << rng.randrange(8),))
        else:
            yield from flips(name, data, range(len(data)), (1, 128) if samples > 1000 else (1,))
        yield from resized(name, data)
    yield from swapped(files)


async def is_found(files: dict[str, bytes], damage: Damage) -> bool:
    """Whether both a load and ``verify`` say so, in an error of ours or a report. A load that returns returns what was
    saved, or it raises AssertionError here.
    """
    storage = MemoryStorage("here")
    storage._objects.update({**files, damage.name: damage.content or b""})
    if damage.content is None:
        del storage._objects[damage.name]
    try:
        if await version_at(storage) and not damage.unread:
            return False
    except AsyncDCPError:  # another error of ours than those of a checkpoint that is not there
        pass
    try:
        return not (await verify(storage, Trace())).ok
    except (CheckpointNotFound, AsyncDCPError):
        return True


def examine(ranks: int, samples: int, seed: int, figures: Figures) -> None:
    """All of it. Raises ``Lost`` for damage that nobody found."""

    async def main() -> None:
        files = await checkpoint(ranks)
        for damage in damages(files, samples, random.Random(seed)):
            if damage.content == files.get(damage.name):
                continue
            figures.update(damages=1)
            if not await is_found(files, damage):
                raise Lost(f"{damage.name}, {damage.what}: nobody saw it (seed {seed})")

    with simulated():
        run(main())
