"""Makes small checkpoints by the real writer, and forges them: changes one thing and seals everything again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import anyio
import msgspec
import numpy as np
import pytest
from hypothesis import settings
from numpy.typing import NDArray

from asyncdcp.boxes import Box, whole
from asyncdcp.envelope import _seal, digest
from asyncdcp.errors import AsyncDCPError
from asyncdcp.extensions import PLAIN, Chain, ExtensionRegistry
from asyncdcp.format.blocks import element_runs
from asyncdcp.format.image import FileImage
from asyncdcp.metadata import DTYPE_SIZES, TensorStorageMetadata
from asyncdcp.names import data_name, index_name, make_save_id, record_name
from asyncdcp.pipeline.load import load
from asyncdcp.pipeline.messages import FileJob, Saved, SaveJob, SlabReady
from asyncdcp.pipeline.reader import CheckpointReader
from asyncdcp.pipeline.writer import CheckpointWriter
from asyncdcp.planning import ChunkSpec, SavePlan, Structure, TensorSpec, Want, plan_load, plan_save
from asyncdcp.storage import MemoryStorage, Storage
from asyncdcp.testing.storage import page_buffer
from asyncdcp.trace import Trace

Arrays = Mapping[str, NDArray[Any]]
Change = Callable[[dict[str, Any]], object]
"""What a ``Forger`` does to a body."""
steady = settings(deadline=None, derandomize=True, max_examples=60)
"""For properties: the machine may be busy, and a run is the same every time."""

SAVE = make_save_id("run", "here", 1)
OTHER = make_save_id("run", "here", 2)
INDEX, RECORD = index_name(SAVE, 0), record_name(SAVE)
BLOCK, SLAB = 4096, 16384
STATE: Arrays = {
    "w": np.arange(6000, dtype=np.float32).reshape(60, 100),
    "b": np.arange(7, dtype=np.int8),
    "s": np.array(3.5),
}


def structure_of(arrays: Arrays, **changes: Any) -> Structure:
    """Whole arrays, one chunk each."""
    tensors = tuple(TensorSpec(name, array.dtype.name, array.shape) for name, array in arrays.items())
    chunks = tuple(ChunkSpec(n, whole(tensor.shape)) for n, tensor in enumerate(tensors))
    return replace(Structure(tensors, chunks, {}, {"t": "w"}), **changes)


def images_of(plan: SavePlan, sources: Sequence[bytes]) -> list[bytearray]:
    """The file images that staging would make: each slab's header part, then its pieces."""
    images = [bytearray(image.size) for image in plan.images]
    for slab in plan.slabs:
        header = plan.images[slab.file].header[slab.begin : slab.begin + slab.length]
        images[slab.file][slab.begin : slab.begin + len(header)] = header
        for chunk, start, offset, length in slab.pieces:
            at = slab.begin + offset
            images[slab.file][at : at + length] = sources[chunk][start : start + length]
    return images


def parts_of(plan: SavePlan, arrays: Arrays) -> list[bytes]:
    """The bytes of every chunk of a plan."""
    found = list(arrays.values())
    return [np.ascontiguousarray(found[chunk.tensor][_slices(chunk.box)]).tobytes() for chunk in plan.chunks]


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(box.offsets, box.sizes, strict=True))


class Slabs:
    """A ``SlabSource`` over finished images; every slab has a slot of its own. ``given_back`` are the slots done."""

    def __init__(self, plan: SavePlan, images: Sequence[bytes | bytearray]) -> None:
        self.ready = deque[SlabReady]()
        self.given_back: list[int] = []
        self._slots: list[memoryview] = []
        for slot, slab in enumerate(plan.slabs):
            self.ready.append(SlabReady(slab.file, slab.begin // SLAB, slot, slab.length))
            part = bytes(images[slab.file][slab.begin : slab.begin + slab.length])
            self._slots.append(page_buffer(part.ljust(SLAB, b"?")))

    async def receive(self) -> SlabReady:
        await anyio.lowlevel.checkpoint()
        if not self.ready:
            raise anyio.EndOfStream
        return self.ready.popleft()

    def view(self, slot: int) -> memoryview:
        return self._slots[slot]

    def done(self, slot: int) -> None:
        self.given_back.append(slot)


def elements_of(plan: SavePlan, image: FileImage) -> list[tuple[int, int]]:
    """The element sizes in an image."""
    specs = [plan.structure.tensors[plan.chunks[number].tensor] for number in image.chunks]
    found = zip(specs, image.begins, strict=True)
    return element_runs((begin, DTYPE_SIZES[spec.dtype]) for spec, begin in found if 0 not in spec.shape)


def job_of(plan: SavePlan, **changes: Any) -> SaveJob:
    save_id, rank = changes.get("save_id", SAVE), changes.get("rank", plan.structure.rank)
    fields: dict[str, Any] = {
        "save_id": save_id,
        "rank": rank,
        "world_size": 1,
        "files": [
            FileJob(data_name(save_id, rank, n, changes.get("transforms", ())), image.size, elements_of(plan, image))
            for n, image in enumerate(plan.images)
        ],
        "slab_bytes": SLAB,
        "block_bytes": BLOCK,
        "plan": msgspec.Raw(plan.index_plan),
        "values": msgspec.Raw(b'{"step":1}'),
        "tensors": len(plan.structure.tensors),
        "tensor_bytes": plan.tensor_bytes,
        "overwrite": False,
        "deadline": 1800.0,
        "metadata": {"note": "ü"},
        "versions": {"asyncdcp": "0"},
    }
    return SaveJob(**{**fields, **changes})


def plan_of(structure: Structure, file_limit: int = 1 << 40) -> SavePlan:
    """In slabs of these tests' size."""
    return plan_save(structure, slab_bytes=SLAB, file_limit=file_limit)


def writer_of(
    storage: Storage,
    arrays: Arrays = STATE,
    *,
    file_limit: int = 1 << 40,
    structure: Structure | None = None,
    chain: Chain = PLAIN,
    **job: Any,
) -> tuple[CheckpointWriter, Slabs]:
    plan = plan_of(structure or structure_of(arrays), file_limit)
    slabs = Slabs(plan, images_of(plan, parts_of(plan, arrays)))
    job = {"transforms": chain.descriptors, **job}
    return CheckpointWriter(job_of(plan, **job), storage, slabs, Trace(), chain), slabs


async def save(storage: Storage, arrays: Arrays = STATE, **options: Any) -> Saved:
    writer, _ = writer_of(storage, arrays, **options)
    return await writer.run()


class ArrayTarget:
    """A load's target: packed, or (without ``direct``) filled piece by piece."""

    def __init__(self, box: Box, dtype: str, *, direct: bool = True) -> None:
        self.array = np.zeros(box.sizes, dtype)
        self._box = box
        flat = self.array.reshape(-1).view(np.uint8)
        self.buffer = flat.data if direct else None

    def deliver(self, chunk: Box, start: int, data: memoryview) -> None:
        size = self.array.dtype.itemsize
        assert start % size == 0 and len(data) % size == 0
        for n, value in enumerate(np.frombuffer(data, self.array.dtype), start // size):
            point = np.unravel_index(n, chunk.sizes)
            at = tuple(int(i) + a - b for i, a, b in zip(point, chunk.offsets, self._box.offsets, strict=True))
            if all(0 <= i < extent for i, extent in zip(at, self._box.sizes, strict=True)):
                self.array[at] = value


async def read_all(
    storage: Storage, registry: ExtensionRegistry | None = None, *, direct: bool = True
) -> dict[str, NDArray[Any]]:
    async with await CheckpointReader.open(storage, registry=registry) as reader:
        tensors = {k: t for k, t in reader.metadata.state_dict_metadata.items() if isinstance(t, TensorStorageMetadata)}
        wants = [Want(name, whole(tensor.size)) for name, tensor in tensors.items()]
        targets = [
            ArrayTarget(whole(tensor.size), tensor.properties.dtype, direct=direct) for tensor in tensors.values()
        ]
        await load(reader, plan_load(reader.metadata, wants), targets, Trace())
        return {want.name: target.array for want, target in zip(wants, targets, strict=True)}


class Forger:
    """A checkpoint in memory. ``index`` and ``record`` let a change be made to the body, and seal it again."""

    def __init__(self, storage: MemoryStorage, save_id: str = SAVE) -> None:
        self.storage = storage
        self.objects = storage._objects
        self._save_id = save_id
        self.data = data_name(save_id, 0, 0)
        self.names = {"index": index_name(save_id, 0), "record": record_name(save_id)}

    def body(self, kind: str) -> dict[str, Any]:
        body = msgspec.json.decode(self.objects[self.names[kind]])["body"]
        assert isinstance(body, dict)
        return body

    def record(self, change: Change) -> None:
        body = self.body("record")
        change(body)
        self.objects[self.names["record"]] = _seal("record", msgspec.json.encode(body))

    def index(self, change: Change) -> None:
        body = self.body("index")
        change(body)
        self.put_index(_seal("index", msgspec.json.encode(body)))

    def put_index(self, data: bytes) -> None:
        """Replaces the whole file of the Index; the Record then lists it as it is."""
        self.objects[self.names["index"]] = data
        ref = {"name": self.names["index"], "size": len(data), "digest": digest(data)}
        self.record(lambda body: body.update(indexes=[ref]))

    def flip(self, name: str, position: int, mask: int = 1) -> None:
        data = bytearray(self.objects[name])
        data[position] ^= mask
        self.objects[name] = bytes(data)


async def forger(arrays: Arrays = STATE, **options: Any) -> Forger:
    storage = MemoryStorage("here")
    await save(storage, arrays, **options)
    return Forger(storage)


async def refused(forged: Forger, kind: type[AsyncDCPError], *words: str, tensor: str | None = None) -> AsyncDCPError:
    with pytest.raises(kind) as caught:
        await CheckpointReader.open(forged.storage)
    assert type(caught.value) is kind and (caught.value.path or "").startswith("here")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert len(str(caught.value)) < 1000
    if tensor is not None:
        assert tensor in caught.value.tensors and tensor in str(caught.value)
    return caught.value
