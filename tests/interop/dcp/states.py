"""States, and ways to save them with DCP as several ranks in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, StorageWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

State = dict[str, Any]


def training_state() -> State:
    """A training state of every kind that DCP carries, some larger than a read takes at once."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.BatchNorm1d(30))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 40)).sum().backward()
    optimizer.step()
    return {
        "model": dict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "big": torch.randn(300, 1000),
        "transposed": torch.randn(200, 300).t(),
        "half": torch.randn(64, 700).to(torch.bfloat16),
        "part of more": torch.randn(100, 500)[20:80],
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "bools": torch.tensor([True, False]),
        "progress": {
            "step": 7,
            "name": "run",
            "loss": [0.5, 0.25],
            "pair": (1, None),
            "raw": b"\0\1",
            "nested": [{"a": 1}],
        },
        "averages": [torch.ones(3), torch.zeros(2)],
    }


def shard(tensor: Tensor, offsets: Sequence[int], shape: Sequence[int]) -> Tensor:
    """``tensor`` as the part at ``offsets`` of one of ``shape``: what DTensor is to DCP, with no other rank needed."""
    part: Any = tensor.clone()
    size = torch.Size(shape)
    chunk = ChunkStorageMetadata(torch.Size(offsets), tensor.size())
    data = TensorWriteData(chunk, TensorProperties.create_from_tensor(tensor), size)

    def items(fqn: str, _: Tensor) -> list[WriteItem]:
        return [WriteItem(MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD, tensor_data=data)]

    part.__create_write_items__ = items
    part.__create_chunk_list__ = lambda: [chunk]
    part.__get_tensor_shard__ = lambda index: tensor
    part.size = lambda: size
    return part


def save_as_ranks(writer: Callable[[], StorageWriter], states: Sequence[State]) -> Metadata:
    writers = [writer() for _ in states]
    planners = [DefaultSavePlanner() for _ in states]
    plans = []
    for rank, (state, own, planner) in enumerate(zip(states, writers, planners, strict=True)):
        planner.set_up_planner(state, own.storage_meta(), rank == 0)
        own.set_up_storage_writer(rank == 0, rank=rank, use_collectives=True)
        plans.append(own.prepare_local_plan(planner.create_local_plan()))
    plans, metadata = planners[0].create_global_plan(plans)
    plans = writers[0].prepare_global_plan(plans)
    results = [
        own.write_data(planner.finish_plan(plan), planner).value()
        for own, planner, plan in zip(writers, planners, plans, strict=True)
    ]
    writers[0].finish(metadata, results)
    return metadata


def blank(state: Any) -> Any:
    """A state of the same structure and other content."""
    if isinstance(state, Tensor):
        return torch.full_like(state, 1) if state.dtype != torch.bool else ~state
    if isinstance(state, dict):
        return type(state)((key, blank(value)) for key, value in state.items())
    if isinstance(state, list) and any(isinstance(item, Tensor | dict | list) for item in state):
        return [blank(item) for item in state]
    return None


def files(path: Path) -> set[str]:
    return {file.name for file in path.iterdir()}
