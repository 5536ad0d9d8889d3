"""DTensors on a mesh of one process: which are one, which are refused, and what is made in their place."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from asyncdcp.errors import UnsupportedValue
from asyncdcp.state_dict.chunks import empty_like
from asyncdcp.state_dict.flatten import flatten


@pytest.fixture
def mesh(tmp_path):
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh

    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    destroy_process_group()


def test_dtensors(mesh):
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    local = torch.ones(4, 2)
    sharded = DTensor.from_local(local, mesh, [Shard(0)])
    replicated = DTensor.from_local(local, mesh, [Replicate()])
    empty = DTensor.from_local(torch.empty(0, 2), mesh, [Shard(0)])
    flat = flatten({"s": sharded, "s2": sharded.detach(), "r": replicated, "l": local, "e": empty, "e2": empty})
    assert list(flat.tensors) == ["s", "r", "l", "e", "e2"]
    assert flat.tensors["s"] is sharded
    assert flat.aliases == {"s2": "s"}
    with pytest.raises(UnsupportedValue, match=r"'g' is a .*DTensor, .*Partial.*redistribute"):
        flatten({"g": DTensor.from_local(local, mesh, [Partial()])})
    with pytest.raises(UnsupportedValue, match=r"'m' is a .*DTensor, .*meta"):
        flatten({"m": DTensor.from_local(local.to("meta"), mesh, [Shard(0)])})


def test_what_is_made_for_a_dtensor_has_its_strides(mesh):
    """A fused optimizer takes that for granted of its state."""
    from torch.distributed.tensor import DTensor, Shard

    target = DTensor.from_local(torch.ones(4, 2).t(), mesh, [Shard(0)])
    made: Any = empty_like(target, torch.half, torch.device("cpu"))
    assert made.stride() == made.to_local().stride() == (1, 2)
    assert made.dtype == made.to_local().dtype == torch.half


def test_what_is_made_for_a_dtensor_of_torchrecs_shards(mesh):
    """They know no ``empty_like``."""
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

    local: Any = LocalShardsWrapper([torch.ones(4, 2)], [(0, 0)])
    target = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size([4, 2]), stride=(2, 1))
    made: Any = empty_like(target, torch.half, torch.device("cpu"))
    assert made.shape == made.to_local().shape == (4, 2)
    assert type(made.to_local()) is torch.Tensor
