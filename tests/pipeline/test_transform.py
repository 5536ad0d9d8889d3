"""Transformed saves and loads: packed in order within bounded memory, any range of them readable, no bit changed."""

from __future__ import annotations

import random
import threading
from functools import partial
from typing import Any

import anyio
import numpy as np
import pytest

from asyncdcp.envelope import decode_index, decode_record
from asyncdcp.errors import AsyncDCPError, ChecksumMismatch, CorruptCheckpoint, KeyUnavailable, UsageError
from asyncdcp.extensions import AESGCM, BlockContext, BlockExtension, BytePlanes, Chain, ExtensionRegistry, ZStandard
from asyncdcp.names import data_name, index_name, record_name
from asyncdcp.pipeline import transform
from asyncdcp.pipeline.reader import CheckpointReader
from asyncdcp.pipeline.verify import verify
from asyncdcp.pipeline.windows import ReadRange
from asyncdcp.storage import LocalStorage, MemoryStorage
from asyncdcp.trace import Trace
from tests.extensions.samples import Xor, Zlib
from tests.pipeline.forge import (
    BLOCK,
    OTHER,
    SAVE,
    SLAB,
    Arrays,
    Forger,
    images_of,
    parts_of,
    read_all,
    save,
    structure_of,
    writer_of,
)

KEY = bytes(range(32))
RNG = np.random.default_rng(0)
ARRAYS: Arrays = {
    "noise": RNG.integers(0, 256, 70_001, np.uint8),
    "w": RNG.standard_normal(40_000).astype(np.float32),
    "h": RNG.standard_normal(5_001).astype(np.float16),
    "zeros": np.zeros(90_000, np.int64),
    "none": np.zeros((0, 3), np.float64),
}
CHAINS: dict[str, list[BlockExtension | Zlib]] = {
    "zstd": [ZStandard()],
    "planes": [BytePlanes()],
    "all": [BytePlanes(), ZStandard(), AESGCM(KEY)],
    "hidden": [AESGCM(KEY, hide_metadata=True)],
    "own": [Xor(), Zlib()],
}


def known(name: str) -> ExtensionRegistry:
    return ExtensionRegistry(CHAINS[name])


def suffix(chain: Chain) -> str:
    return data_name(SAVE, 0, 0, chain.descriptors)


@pytest.mark.parametrize("name", CHAINS)
async def test_what_goes_in_comes_out(name: str, tmp_path: Any) -> None:
    chain = Chain(CHAINS[name])
    storage = LocalStorage(str(tmp_path))
    saved = await save(storage, ARRAYS, chain=chain, file_limit=300_000)
    sizes = await storage.list()
    assert saved.stored_bytes == sum(size for file, size in sizes.items() if not file.endswith(".json"))
    loaded = await read_all(storage, known(name))
    assert all(np.array_equal(loaded[key], array) for key, array in ARRAYS.items())
    record = decode_record(await storage.get(record_name(SAVE), 1 << 20), "r") if name != "hidden" else None
    if record is not None:
        assert record.summary is not None and record.summary.transforms == chain.descriptors
        assert record.summary.stored_bytes == saved.stored_bytes


async def test_random_ranges() -> None:
    """Within blocks, across them, overlapping, delivered or copied: every byte is the image's."""
    storage, chain = MemoryStorage(), Chain(CHAINS["all"])
    writer, _ = writer_of(storage, ARRAYS, chain=chain)
    await writer.run()
    plan = transform_plan()
    (image,) = images_of(plan, parts_of(plan, ARRAYS))
    rng = random.Random(0)
    spans = [sorted(rng.sample(range(len(image) + 1), 2)) for _ in range(30)] + [[0, 1], [BLOCK - 1, BLOCK + 1]]
    into = [bytearray(end - begin) for begin, end in spans]
    taken = [bytearray(end - begin) for begin, end in spans]

    def deliver(target: bytearray, offset: int, data: memoryview) -> None:
        target[offset : offset + len(data)] = data

    file = suffix(chain)
    ranges = [ReadRange(file, a, b, memoryview(out), None) for (a, b), out in zip(spans, into, strict=True)]
    ranges += [ReadRange(file, a, b, None, partial(deliver, out)) for (a, b), out in zip(spans, taken, strict=True)]
    async with await CheckpointReader.open(storage, registry=known("all")) as reader:
        await reader.read(ranges, Trace())
    assert into == taken == [image[begin:end] for begin, end in spans]


def transform_plan() -> Any:
    from asyncdcp.planning import plan_save

    return plan_save(structure_of(ARRAYS), slab_bytes=SLAB, file_limit=1 << 40)


async def test_slabs_in_any_order_are_packed_in_theirs(tmp_path: Any) -> None:
    chain, storage = Chain([ZStandard()]), LocalStorage(str(tmp_path))
    writer, slabs = writer_of(storage, ARRAYS, chain=chain, file_limit=90_000)
    ready = list(slabs.ready)
    random.Random(3).shuffle(ready)
    slabs.ready.clear()
    slabs.ready.extend(ready)
    await writer.run()
    loaded = await read_all(storage)
    assert all(np.array_equal(loaded[key], array) for key, array in ARRAYS.items())
    assert sorted(slabs.given_back) == list(range(len(ready)))


class Growing(BlockExtension):
    """Makes every block longer, and counts what is encoded and not yet stored."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.encoded = self.most = 0

    @staticmethod
    def registry_name() -> str:
        return "growing"

    @staticmethod
    def from_descriptor(version: str) -> Growing:
        return Growing()

    def get_descriptor(self) -> str:
        return "growing/1"

    def encode(self, data: memoryview, context: BlockContext) -> bytes:
        with self.lock:
            self.encoded += 2 * len(data)
        return bytes(data) * 2

    def decode(self, data: memoryview, context: BlockContext) -> bytes:
        return bytes(data[: len(data) // 2])


@pytest.mark.parametrize("slabs", [20, 60])
async def test_memory_is_bounded_whatever_the_number_of_blocks(slabs: int) -> None:
    """A storage that writes slowly: what is encoded and not written stays below a bound that no size changes."""
    growing, arrays = Growing(), {"w": RNG.integers(0, 256, slabs * SLAB, np.uint8)}
    written = 0

    class Slow(MemoryStorage):
        async def create(self, name: str, length_hint: int) -> Any:
            inner = await super().create(name, length_hint)
            write = inner.write

            async def slow(offset: int, buffer: memoryview) -> None:
                nonlocal written
                for _ in range(50):
                    await anyio.lowlevel.checkpoint()
                growing.most = max(growing.most, growing.encoded - written)
                await write(offset, buffer)
                written += len(buffer)

            inner.write = slow  # type: ignore[method-assign]
            return inner

    storage = Slow()
    await save(storage, arrays, chain=Chain([growing]))
    at_once = transform.slabs_at_once()
    assert growing.encoded >= 2 * slabs * SLAB
    assert growing.most <= (transform.BUFFERS + 2 * (at_once + 1)) * SLAB
    assert np.array_equal((await read_all(storage, ExtensionRegistry([growing])))["w"], arrays["w"])


async def test_an_extension_that_fails_fails_the_save_and_leaves_nothing() -> None:
    class Failing(Xor):
        def encode(self, data: memoryview, context: BlockContext) -> bytes:
            if context.block == 7:
                raise RuntimeError("seven")
            return super().encode(data, context)

    storage = MemoryStorage()
    with pytest.raises(AsyncDCPError, match=r"xor@tests/5a failed at block 7 of .*seven"):
        await save(storage, ARRAYS, chain=Chain([Failing()]))
    assert not storage._unfinished and not [name for name in storage._objects if not name.endswith(f"{SAVE}.json")]


# ── damage, with and without the key ──


async def forged(name: str) -> Forger:
    storage = MemoryStorage()
    await save(storage, {"w": ARRAYS["w"][:9000], "h": ARRAYS["h"]}, chain=Chain(CHAINS[name]))
    made = Forger(storage)
    made.data = suffix(Chain(CHAINS[name]))
    return made


@pytest.mark.parametrize("name", ["zstd", "all", "hidden"])
async def test_a_flipped_bit_anywhere_is_found(name: str) -> None:
    made, rng = await forged(name), random.Random(5)
    whole = dict(made.objects)
    for file in whole:
        for bit in rng.sample(range(len(whole[file]) * 8), 40):
            flipped = bytearray(whole[file])
            flipped[bit // 8] ^= 1 << bit % 8
            made.objects[file] = bytes(flipped)
            try:
                assert not (await verify(made.storage, Trace(), known(name))).ok
                loaded = await read_all(made.storage, known(name))  # a block of header alone is not read
            except AsyncDCPError:
                continue
            assert np.array_equal(loaded["w"], ARRAYS["w"][:9000]) and np.array_equal(loaded["h"], ARRAYS["h"])
        made.objects[file] = whole[file]
    await read_all(made.storage, known(name))


def at_file(change: Any, body: dict[str, Any]) -> None:
    change(body["files"][0])


async def test_lengths_that_make_no_sense() -> None:
    changes: list[tuple[Any, str]] = [
        (lambda file: file["lengths"].pop(), "not as many"),
        (lambda file: file["lengths"].__setitem__(0, 0), "impossible length"),
        (lambda file: file["lengths"].__setitem__(0, 1 << 40), "impossible length"),
        (lambda file: file["lengths"].__setitem__(0, 5), "is stored in"),
        (lambda file: file.pop("lengths"), "none with them"),
        (lambda file: file.update(name=data_name(SAVE, 0, 0)), "cannot be named"),
    ]
    for change, words in changes:
        made = await forged("zstd")
        made.index(partial(at_file, change))
        with pytest.raises(CorruptCheckpoint, match=words):
            await CheckpointReader.open(made.storage)


async def test_two_blocks_that_change_places_are_found_without_and_with_a_key() -> None:
    """Whoever can write to the storage fits checksums and lengths; without a key nobody can tell, with one anybody."""
    made = await forged("own")
    swap(made)
    assert not np.array_equal((await read_all(made.storage, known("own")))["w"], ARRAYS["w"][:9000])
    made = await forged("all")
    swap(made)
    with pytest.raises(CorruptCheckpoint, match=r"is not what was sealed|is not authenticated"):
        await read_all(made.storage, known("all"))


def swap(made: Forger) -> None:
    """Swaps the stored blocks 2 and 3, and everything that speaks of them."""

    def change(body: dict[str, Any]) -> None:
        import base64

        file = body["files"][0]
        lengths, sums = file["lengths"], bytearray(base64.b64decode(file["checksums"]))
        at = sum(lengths[:2])
        data = made.objects[made.data]
        first, second = data[at : at + lengths[2]], data[at + lengths[2] : at + lengths[2] + lengths[3]]
        made.objects[made.data] = data[:at] + second + first + data[at + len(first) + len(second) :]
        lengths[2], lengths[3] = lengths[3], lengths[2]
        sums[16:24], sums[24:32] = sums[24:32], sums[16:24]
        file["checksums"] = base64.b64encode(sums).decode()

    made.index(change)


async def test_a_record_without_its_seal_is_refused() -> None:
    made = await forged("all")
    made.record(lambda body: body.update(metadata={"note": "mine"}))
    with pytest.raises(CorruptCheckpoint, match=rf"{SAVE}\.json is not authenticated"):
        await read_all(made.storage, known("all"))


async def test_blocks_of_another_save_are_refused() -> None:
    """A replay: data of an older save of the same state, put in the place of this one's, tables and all."""
    made = await forged("all")
    older = MemoryStorage()
    await save(older, {"w": ARRAYS["w"][:9000], "h": ARRAYS["h"]}, chain=Chain(CHAINS["all"]), save_id=OTHER)
    made.objects[made.data] = older._objects[data_name(OTHER, 0, 0, ["x/1"])]
    with pytest.raises(ChecksumMismatch):
        await read_all(made.storage, known("all"))


async def test_without_the_key() -> None:
    made = await forged("all")
    with pytest.raises(KeyUnavailable, match="cannot be read: the data is encrypted with the key"):
        await read_all(made.storage)
    with pytest.raises(KeyUnavailable, match="and the key given is"):
        await read_all(made.storage, ExtensionRegistry([AESGCM(bytes(32))]))
    wrong = AESGCM(bytes(32), key_id=CHAINS["all"][2].get_descriptor().partition(".aesgcm/1.")[2])
    with pytest.raises(CorruptCheckpoint, match="another key has the id"):
        await read_all(made.storage, ExtensionRegistry([wrong]))
    async with await CheckpointReader.open(made.storage, data=False) as reader:
        assert set(reader.metadata.state_dict_metadata) >= {"w", "h"}
        with pytest.raises(UsageError, match="was opened without its extensions"):
            await reader.read([ReadRange(made.data, 0, 10, memoryview(bytearray(10)), None)], Trace())
    assert (await verify(made.storage, Trace())).ok
    assert decode_index(made.objects[index_name(SAVE, 0)], "i").transforms == Chain(CHAINS["all"]).descriptors


async def test_without_the_key_of_hidden_metadata() -> None:
    made = await forged("hidden")
    assert b'"w"' not in made.objects[index_name(SAVE, 0)] and b"note" not in made.objects[record_name(SAVE)]
    assert b"F32" not in made.objects[made.data]
    for attempt in (read_all(made.storage), verify(made.storage, Trace())):
        with pytest.raises(KeyUnavailable, match="is encrypted"):
            await attempt
    assert (await verify(made.storage, Trace(), known("hidden"))).ok
    with pytest.raises(KeyUnavailable, match="is encrypted"):  # nor can it be overwritten blindly
        await save(made.storage, ARRAYS, save_id=OTHER, overwrite=True)
    await save(made.storage, ARRAYS, save_id=OTHER, overwrite=True, chain=Chain(CHAINS["hidden"]))
    assert not [name for name in made.objects if name.startswith(SAVE)]
