"""Files and messages made of anything: refused with an error of ours, in bounded memory, and nothing else touched."""

from __future__ import annotations

import copy
import random
import tracemalloc
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from asyncdcp.envelope import _seal, digest
from asyncdcp.errors import AsyncDCPError
from asyncdcp.pipeline.verify import verify
from asyncdcp.storage import LocalStorage
from asyncdcp.testing.disk import SimulatedDisk
from asyncdcp.trace import Trace
from asyncdcp.worker.protocol import Framer, ProtocolError, ToTrainer, ToWorker
from tests.pipeline.forge import read_all
from tests.reliability.corruption import checkpoint
from tests.reliability.power import Figures
from tests.reliability.simulation import simulated
from tests.reliability.worlds import PLACE, Lost
from tests.virtual import run as run_virtually

MEMORY: Final = 64 << 20
"""More bytes than a load of a small checkpoint, whatever it says of itself, may take."""

VALUES: Final[tuple[Any, ...]] = (
    *(None, True, -1, 0, 1, 2, 7, 4096, 1 << 20, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 64, -(1 << 63), 0.5, 1e300),
    *("", "a", "../../etc/passwd", "/etc/passwd", "..", "\0", "ü" * 300, "float32", "AAAAAAAAAAA=", "commit", "abort"),
    *([], {}, [[]], [0], [-1], [1 << 62] * 3, {"a": {"b": []}}, [None] * 50),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from places(inner, (*path, number))


def mutated(body: dict[str, Any], rng: random.Random) -> Any:
    """The value with some places replaced, doubled, removed, or taken from elsewhere in it."""
    changed: Any = copy.deepcopy(body)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        path = rng.choice(list(places(changed)))
        if not path:
            continue
        holder = changed
        for step in path[:-1]:
            holder = holder[step]
        match rng.randrange(5):
            case 0 | 1:
                holder[path[-1]] = copy.deepcopy(rng.choice(VALUES))
            case 2:
                del holder[path[-1]]
            case 3 if isinstance(holder, list):
                holder.insert(path[-1], copy.deepcopy(holder[path[-1]]))
            case _:
                old = holder[path[-1]]
                holder[path[-1]] = old + rng.choice((-1, 1, 8)) if isinstance(old, int) else copy.deepcopy(holder)
    return changed


def forged(files: dict[str, bytes], rng: random.Random) -> dict[str, bytes]:
    """A checkpoint with its Record or Index mutated, and all digests made to fit."""
    files = dict(files)
    record = next(name for name in files if name.count(".") == 1 and name.endswith(".json"))
    index = next(name for name in files if name.endswith(".index.json"))
    kind = rng.choice(("record", "index", "index"))
    if kind == "index":
        body = mutated(msgspec.json.decode(files[index])["body"], rng)
        files[index] = _seal("index", msgspec.json.encode(body))
        body = msgspec.json.decode(files[record])["body"]
        ref = {"name": index, "size": len(files[index]), "digest": digest(files[index])}
        body["indexes"] = [ref, *body["indexes"][1:]]
    else:
        body = mutated(msgspec.json.decode(files[record])["body"], rng)
    files[record] = _seal("record", msgspec.json.encode(body))
    if rng.random() < 0.1:
        place = rng.randrange(len(files[record]))
        files[record] = files[record][:place] + rng.randbytes(rng.randrange(20)) + files[record][place:]
    return files


class Guarded(SimulatedDisk):
    """Outside of the checkpoint's directory there is nothing to be opened."""

    def open(self, path: str, flags: int, /) -> int:
        if not path.startswith(f"{PLACE}/"):
            raise Lost(f"{path!r} was opened")
        return super().open(path, flags)


async def attack(files: dict[str, bytes]) -> str:
    """Loads and verifies; how that ended."""
    parts = PLACE.strip("/").split("/")
    image: dict[str, bytes | None] = {"/" + "/".join(parts[: n + 1]): None for n in range(len(parts))}
    image |= {f"{PLACE}/{name}": data for name, data in files.items()}
    ended = []
    for look in (read_all, lambda storage: verify(storage, Trace())):
        try:
            await look(LocalStorage(PLACE, posix=Guarded({**image, "/etc": None, "/etc/passwd": b"secret"})))
        except AsyncDCPError as error:
            ended.append(type(error).__name__)
        else:
            ended.append("loaded")
    return ended[0]


def checkpoints(cases: int, seed: int, figures: Figures) -> None:
    """Forged ones. Raises ``Lost`` for anything but an error of ours, with the seed that replays it."""

    async def main() -> None:
        files = await checkpoint()
        tracemalloc.start()
        for number in range(seed, seed + cases):
            tracemalloc.reset_peak()
            try:
                ended = await attack(forged(files, random.Random(number)))
            except Exception as error:
                raise Lost(f"seed {number}: {type(error).__name__}: {error}") from error
            if tracemalloc.get_traced_memory()[1] > MEMORY:
                raise Lost(f"seed {number}: {tracemalloc.get_traced_memory()[1]} bytes")
            figures.update([ended])
            figures.update(forged=1)

    try:
        with simulated():
            run_virtually(main())
    finally:
        tracemalloc.stop()


def frames(cases: int, seed: int, figures: Figures) -> None:
    """Worker messages: bytes with right and wrong lengths, and JSON that is nearly a message."""
    kinds = ("SaveJob", "Slab", "Begin", "Done", "Failed", "Freed", "Spans", "ShareArena", "Configure")
    for number in range(seed, seed + cases):
        rng = random.Random(number)
        body = msgspec.json.encode({"type": rng.choice(kinds), **{key: rng.choice(VALUES) for key in ("save", "slab")}})
        if rng.random() < 0.5:
            body = rng.randbytes(rng.randrange(200))
        length = len(body) if rng.random() < 0.7 else rng.randrange(1 << rng.choice((4, 8, 33, 64)))
        for direction in (ToWorker, ToTrainer):
            framer: Framer[Any] = Framer(direction)
            try:
                list(framer.feed(length.to_bytes(8, "little") + body))
            except ProtocolError:
                figures.update(refused=1)
            figures.update(frames=1)


def run(cases: int, seed: int, figures: Figures) -> None:
    """Both."""
    checkpoints(cases, seed, figures)
    frames(cases, seed, figures)
