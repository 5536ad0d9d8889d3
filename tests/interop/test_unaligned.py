"""Foreign files whose tensors begin anywhere: elements that lie across two reads arrive whole."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch

from asyncdcp import SyncCheckpointer
from asyncdcp.pipeline import load as loading


@pytest.mark.parametrize("budget", [1, 64 << 20])
def test_strided_and_converted_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    monkeypatch.setattr(loading, "UNALIGNED_BYTES", budget)
    wide, other = torch.arange(800_000, dtype=torch.float64).reshape(800, 1000), torch.arange(300_001)
    entries = {
        "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "wide": {"dtype": "F64", "shape": [800, 1000], "data_offsets": [3, 6_400_003]},
        "other": {"dtype": "I64", "shape": [300_001], "data_offsets": [6_400_003, 8_800_011]},
    }
    header = json.dumps(entries).encode()
    data = bytes(3) + wide.numpy().tobytes() + other.numpy().tobytes()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    state = {
        "odd": torch.ones(3, dtype=torch.uint8),
        "wide": torch.zeros(1000, 800, dtype=torch.float64).t(),
        "other": torch.zeros(300_001, dtype=torch.float32),
    }
    with SyncCheckpointer(process=False) as checkpointer:
        checkpointer.load(tmp_path / "w.safetensors", state, cast="allow")
    assert torch.equal(state["wide"], wide)
    assert torch.equal(state["other"], other.float())
    assert not state["odd"].any()
