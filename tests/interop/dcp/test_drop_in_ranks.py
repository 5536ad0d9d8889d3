"""The drop-in where DCP has several processes: two ranks, and the process of ``async_save``."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from asyncdcp import SyncCheckpointer
from asyncdcp.interop.dcp import FileSystemWriter
from asyncdcp.names import file_save_id
from tests.interop.dcp.states import State, files
from tests.programs import Programs
from tests.work import free_port

ROOT = Path(__file__).parents[3]


@pytest.mark.timeout(120)
def test_two_ranks(programs: Programs, tmp_path: Path) -> None:
    """They save sharded and replicated tensors, overwrite, fail on one side, load resharded; see ``ranks.py``."""
    program = str(Path(__file__).with_name("ranks.py"))
    ranks = [programs.start(program, str(rank), str(tmp_path)) for rank in range(2)]
    ended = [rank.wait(100) for rank in ranks]
    assert [each.returncode for each in ended] == [0, 0], "\n".join(each.stdout + each.stderr for each in ended)
    assert {"__0.metadata", "__1.metadata"} < files(tmp_path / "alone")
    with SyncCheckpointer(process=False) as checkpointer:
        loaded = checkpointer.load(tmp_path / "checkpoint")
        own = checkpointer.load(tmp_path / "own")
    assert loaded["w"].shape == (33, 700) and loaded["step"] == 4
    assert own["w"].shape == (33, 700) and own["step"] == 9
    assert len({file_save_id(name) for name in files(tmp_path / "own")}) == 1, "nothing is left of other saves"


@pytest.mark.timeout(120)
def test_async_save_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = pytest.importorskip("torch.distributed.checkpoint._async_process_executor", reason="torch 2.7 has it")
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

    monkeypatch.setattr(executor, "get_free_port", free_port)  # torch's may be another's before the process has it
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    x = torch.full((1000,), 3.0)
    try:
        saved = dcp.async_save(
            {"x": x, "step": 3},
            storage_writer=FileSystemWriter(tmp_path / "a", thread_count=2),
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
        )
        x.fill_(-1)
        assert isinstance(saved, Future)
        saved.result()
        own = dcp.async_save(
            {"x": torch.full((1000,), 4.0), "step": 4},
            storage_writer=FileSystemWriter(tmp_path / "own", serialization_format="safetensors"),
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
        )
        assert isinstance(own, Future)
        own.result()
    finally:
        executor._CHECKPOINT_PROCESS = None  # there is no other way to end it
    target: State = {"x": torch.zeros(1000), "step": 0}
    dcp.load(target, storage_reader=dcp.FileSystemReader(tmp_path / "a"))
    assert target["x"].eq(3).all() and target["step"] == 3
    with SyncCheckpointer(process=False) as checkpointer:
        loaded = checkpointer.load(tmp_path / "own")
    assert loaded["x"].eq(4).all() and loaded["step"] == 4
