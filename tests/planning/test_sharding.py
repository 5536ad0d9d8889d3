"""What a rank of a mesh holds: for every shape and mesh the ranks' boxes tile the tensor, and are those of torch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from asyncdcp.boxes import Box, tiles, whole
from asyncdcp.planning.sharding import Split, held_boxes, local_shape
from asyncdcp.state_dict.chunks import local_chunks


@st.composite
def meshes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[int, int, int]]]:
    """A shape, and cuts of it: dimension, shards, factor; one for each dimension of a mesh."""
    shape = draw(st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple))
    dims = st.integers(0, len(shape) - 1)
    return shape, draw(st.lists(st.tuples(dims, st.integers(1, 4), st.integers(1, 3)), max_size=3))


@given(meshes())
def test_the_ranks_of_a_mesh_tile_the_tensor(mesh: tuple[tuple[int, ...], list[tuple[int, int, int]]]) -> None:
    shape, cuts = mesh
    found: list[Box] = []
    for coordinate in product(*(range(shards) for _, shards, _ in cuts)):
        splits = [Split(dim, n, kept, factor) for (dim, n, factor), kept in zip(cuts, coordinate, strict=True)]
        held = held_boxes(shape, splits)
        assert tiles(whole(local_shape(shape, splits)), [local for _, local in held if local.volume])
        assert all(box.sizes == local.sizes for box, local in held)
        found += [box for box, _ in held if box.volume]
    assert tiles(whole(shape), found)
    assert sum(box.volume for box in found) == prod(shape)


@pytest.fixture(params=range(4))
def rank(request: pytest.FixtureRequest) -> Iterator[int]:
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=4)
    yield request.param
    dist.destroy_process_group()


def test_chunks_of_dtensors_are_where_torch_has_put_them(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    placements = [Shard(0), Shard(1), Replicate(), _StridedShard(0, split_factor=2), _StridedShard(1, split_factor=3)]
    for shape, both in product([(7, 3), (4, 8), (1, 2), (5, 1)], product(placements, placements)):
        tensor = torch.arange(prod(shape)).view(shape)
        sharded = distribute_tensor(tensor, mesh, both, src_data_rank=None)
        chunks = local_chunks(sharded)
        for box, local in chunks:
            place = tuple(slice(start, start + size) for start, size in zip(*box, strict=True))
            assert torch.equal(tensor[place], local), (shape, both, box)
        assert sum(box.volume for box, _ in chunks) == sharded.to_local().numel()


def test_every_rank_of_a_large_world_is_told_without_talking() -> None:
    """1,024 ranks, a mesh of three dimensions; the arithmetic alone."""
    shape, found = (1000, 64), list[Box]()
    for replica, row, column in product(range(4), range(32), range(8)):
        held = [box for box, _ in held_boxes(shape, [Split(0, 32, row), Split(1, 8, column)]) if box.volume]
        found += held if replica == 0 else []
    assert tiles(whole(shape), found)
