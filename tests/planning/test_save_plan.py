from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from asyncdcp.boxes import Box, tiles
from asyncdcp.metadata import DTYPE_SIZES
from asyncdcp.planning import ChunkSpec, PlanCache, SavePlan, Structure, TensorSpec, plan_save
from tests.pipeline.forge import images_of, parts_of, steady, structure_of

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
states = st.lists(st.tuples(st.sampled_from(["int8", "float16", "float32", "complex128"]), shapes), max_size=6).map(
    lambda kinds: {f"t{n}": counting(dtype, shape) for n, (dtype, shape) in enumerate(kinds)}
)


def counting(dtype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return np.arange(int(np.prod(shape)), dtype=np.int32).astype(dtype).reshape(shape)


@steady
@given(states, st.integers(8, 100), st.sampled_from([512, 4096, 4112, 1 << 20]))
def test_slabs_and_pieces_make_the_images(state: dict[str, Any], file_limit: int, slab_bytes: int) -> None:
    structure = structure_of(state)
    plan = plan_save(structure, slab_bytes=slab_bytes, file_limit=file_limit)
    assert_tiled(plan)
    parts = parts_of(plan, state)
    assert sum(map(len, parts)) == plan.tensor_bytes == sum(array.nbytes for array in state.values())
    images = images_of(plan, parts)
    for image, data in zip(plan.images, images, strict=True):
        safetensors.deserialize(bytes(data))
        for chunk, begin in zip(image.chunks, image.begins, strict=True):
            assert data[begin : begin + len(parts[chunk])] == parts[chunk]
    for image in plan.images:
        assert len(image.chunks) == 1 or image.size - len(image.header) <= file_limit


def assert_tiled(plan: SavePlan) -> None:
    """Slabs tile the files, pieces the rest behind the header, and each chunk is covered once, in order."""
    covered = [0] * len(plan.chunks)
    for file, image in enumerate(plan.images):
        at = 0
        for slab in (slab for slab in plan.slabs if slab.file == file):
            assert slab.begin == at and slab.length > 0
            position = max(len(image.header), slab.begin)
            for chunk, start, offset, length in slab.pieces:
                assert slab.begin + offset == position and start == covered[chunk] and length > 0
                covered[chunk] += length
                position += length
            at += slab.length
            assert position in (at, len(image.header))
        assert at == image.size
    lengths = [chunk.box.volume * DTYPE_SIZES[plan.structure.tensors[chunk.tensor].dtype] for chunk in plan.chunks]
    assert covered == lengths


@steady
@given(states, st.integers(1, 100))
def test_parts_tile_the_chunk_they_come_from(state: dict[str, Any], file_limit: int) -> None:
    plan = plan_save(structure_of(state), file_limit=file_limit)
    for n, origin in enumerate(plan.structure.chunks):
        parts = [chunk for chunk, number in zip(plan.chunks, plan.origins, strict=True) if number == n]
        assert all(part.tensor == origin.tensor for part in parts)
        assert tiles(origin.box, [part.box for part in parts])


def test_a_shard_is_split_where_it_lies() -> None:
    structure = Structure((TensorSpec("w", "int8", (10, 10)),), (ChunkSpec(0, Box((5, 2), (5, 4))),), {}, None)
    plan = plan_save(structure, file_limit=6)
    assert tiles(Box((5, 2), (5, 4)), [chunk.box for chunk in plan.chunks])
    assert set(plan.origins) == {0} and all(image.size - len(image.header) <= 6 for image in plan.images)


def test_nothing_to_save() -> None:
    plan = plan_save(structure_of({}))
    assert not plan.images and not plan.slabs and plan.tensor_bytes == 0


def test_plans_are_deterministic() -> None:
    state = {"a": counting("float16", (3, 5)), "b": counting("float32", (2,))}
    assert plan_save(structure_of(state)) == plan_save(structure_of(state))


def test_the_cache_tells_structures_apart() -> None:
    cache = PlanCache()
    base = structure_of({"a": counting("int8", (3,)), "b": counting("int8", (3,))})
    plan = cache.get(base)
    assert cache.get(replace(base)) is plan
    different = [
        replace(base, aliases={"c": "a"}),
        replace(base, aliases={"c": "b"}),
        replace(base, tree={"t": "other"}),
        replace(base, chunks=base.chunks[:1]),
        replace(base, rank=1),
        replace(base, tensors=(base.tensors[0], TensorSpec("b", "uint8", (3,)))),
    ]
    for structure in different:
        other = cache.get(structure)
        assert other is not plan and other.structure == structure and cache.get(structure) is other


def test_the_cache_drops_what_was_used_least_recently() -> None:
    cache = PlanCache(limit=2)
    one, two, three = (structure_of({name: counting("int8", (3,))}) for name in "abc")
    first = cache.get(one)
    second = cache.get(two)
    assert cache.get(one) is first
    cache.get(three)
    assert cache.get(one) is first and cache.get(two) is not second
