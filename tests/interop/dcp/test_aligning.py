"""Whole elements from pieces that were cut anywhere, and DCP's files whose tensors begin anywhere."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st

from asyncdcp import SyncCheckpointer
from asyncdcp.interop.dcp.pieces import WholeElements


@given(
    itemsize=st.sampled_from([2, 4, 8, 16]),
    elements=st.integers(0, 40),
    cuts=st.lists(st.integers(0, 640), max_size=30),
    seed=st.integers(0, 1 << 30),
)
def test_elements_come_whole_and_once(itemsize: int, elements: int, cuts: list[int], seed: int) -> None:
    data, found = random.Random(seed).randbytes(elements * itemsize), bytearray(elements * itemsize)
    given_bytes = 0

    def deliver(offset: int, piece: memoryview) -> None:
        nonlocal given_bytes
        assert offset % itemsize == len(piece) % itemsize == 0
        found[offset : offset + len(piece)] = piece
        given_bytes += len(piece)

    whole = WholeElements(deliver, itemsize)
    borders = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = list(pairwise(borders))
    random.Random(seed).shuffle(pieces)
    for begin, end in pieces:
        whole(begin, memoryview(data)[begin:end])
    assert found == data and given_bytes == len(data)
    assert not whole._cut


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_tensors_at_odd_places_are_converted_and_scattered(tmp_path: Path) -> None:
    """Torch's archives follow each other without gaps; reads are cut every 8 MiB."""
    stored = {f"t{number}": torch.randn(1_000_001 + number) for number in range(4)} | {"text": "x" * 1003}
    dcp.save(stored, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    tensors = {name: tensor for name, tensor in stored.items() if isinstance(tensor, torch.Tensor)}
    doubles = {name: torch.zeros(len(tensor), dtype=torch.float64) for name, tensor in tensors.items()}
    strided = {name: torch.zeros(2 * len(tensor))[::2] for name, tensor in tensors.items()}
    with SyncCheckpointer(process=False) as checkpointer:
        checkpointer.load(tmp_path, {**doubles, "text": ""}, cast="allow")
        checkpointer.load(tmp_path, {**strided, "text": ""})
    for name, tensor in tensors.items():
        assert torch.equal(doubles[name], tensor.double()) and torch.equal(strided[name], tensor)
