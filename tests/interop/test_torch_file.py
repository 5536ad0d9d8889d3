"""``.pt`` files: opened without running anything of theirs."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncdcp import SyncCheckpointer
from asyncdcp.errors import CheckpointNotFound, CorruptCheckpoint, UnsupportedFormat


class Evil:
    """Says that it was made."""

    def __reduce__(self) -> Any:
        return print, ("it ran",)


def load(path: Path, state: Any = None) -> Any:
    with SyncCheckpointer(process=False) as checkpointer:
        return checkpointer.load(path) if state is None else checkpointer.load(path, state)


def test_a_training_state_comes_back_and_goes_on(tmp_path: Path) -> None:
    def training() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        return model, torch.optim.AdamW(model.parameters())

    model, optimizer = training()
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 2}, tmp_path / "a.pt")
    fresh, stepped = training()
    state = {"model": fresh, "optimizer": stepped, "epoch": 0}
    load(tmp_path / "a.pt", state)
    assert state["epoch"] == 2
    assert torch.equal(fresh.weight, model.weight)
    assert torch.equal(stepped.state_dict()["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


def test_views_ties_and_types(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    state: dict[Any, Any] = {
        "t": base.t(),
        "part": base[1:3, 2:],
        "same": base,
        "tied": base,
        "o": OrderedDict(x=torch.ones(1)),
        5: "five",
    }
    torch.save(state, tmp_path / "a.pt")
    found = load(tmp_path / "a.pt")
    assert all(torch.equal(found[name], state[name]) for name in ("t", "part", "same", "tied"))
    assert found["same"] is found["tied"]
    assert (type(found["o"]), found[5]) == (OrderedDict, "five")


def test_a_hostile_file_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"w": torch.ones(2), "evil": Evil()}, tmp_path / "a.pt")
    with pytest.raises(UnsupportedFormat, match="which is not unpickled"):
        load(tmp_path / "a.pt")
    assert capsys.readouterr().out == ""


def test_a_file_of_before_torch_1_6_is_told_with_the_way_out(tmp_path: Path) -> None:
    old = tmp_path / "a.pt"
    torch.save({"w": torch.ones(2)}, old, _use_new_zipfile_serialization=False)
    with pytest.raises(UnsupportedFormat, match=r"before torch 1\.6, .* write it anew: torch\.save\(torch\.load\("):
        load(old)
    torch.save(torch.load(old, weights_only=True), tmp_path / "new.pt")
    assert torch.equal(load(tmp_path / "new.pt")["w"], torch.ones(2))


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("not a checkpoint")
    with pytest.raises(CheckpointNotFound):
        load(tmp_path / "a.txt")
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    with pytest.raises(UnsupportedFormat, match="a Tensor, not a dict"):
        load(tmp_path / "tensor.pt")
    torch.save({"w": torch.ones(1000)}, tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptCheckpoint, match=r"no file of torch\.save"):
        load(tmp_path / "a.pt")
