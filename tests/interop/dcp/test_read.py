"""DCP checkpoints of stock torch, opened as they are."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex

from asyncdcp import SyncCheckpointer
from asyncdcp.errors import CheckpointNotFound, CorruptCheckpoint, UnsupportedFormat, UnsupportedValue
from tests.interop.dcp.states import State, blank, save_as_ranks, shard
from tests.interop.dcp.torchs import extension_options, needs_extensions, torchs_zstd

Same = Callable[[Any, Any], bool]


@pytest.fixture
def checkpointer() -> Iterator[SyncCheckpointer]:
    with SyncCheckpointer(process=False) as made:
        yield made


def read_metadata(path: Path) -> Any:
    return pickle.loads(path.read_bytes())  # noqa: S301  # the test's own


def put_entry(folder: Path, content: bytes) -> None:
    """Makes ``content`` the entry of the only tensor, x."""
    metadata = read_metadata(folder / ".metadata")
    metadata.storage_data[MetadataIndex("x", [0])].length = len(content)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / "__0_0.distcp").write_bytes(content)


def plain(state: State) -> State:
    """What DCP keeps of a state: no types of mappings."""
    return {key: plain(value) if isinstance(value, dict) else value for key, value in state.items()}


@pytest.mark.parametrize(
    "options",
    [{}, {"thread_count": 3}, {"single_file_per_rank": False}, extension_options()],
    ids=["default", "threads", "a file each", "zstd"],
)
def test_all_of_a_state(
    tmp_path: Path, state: State, same: Same, checkpointer: SyncCheckpointer, options: dict[str, Any]
) -> None:
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path, **options))
    assert same(checkpointer.load(tmp_path), plain(state))


def test_into_modules_and_optimizers(tmp_path: Path, checkpointer: SyncCheckpointer, same: Same) -> None:
    def make(seed: int) -> State:
        torch.manual_seed(seed)
        model = torch.nn.Linear(30, 20)
        return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=seed), "step": seed}

    trained, other = make(1), make(2)
    trained["model"](torch.ones(30)).sum().backward()
    trained["optimizer"].step()
    dcp.save(trained, checkpoint_id=tmp_path)
    weight = other["model"].weight
    checkpointer.load(tmp_path, other)
    assert other["model"].weight is weight and other["step"] == 1
    for name in ("model", "optimizer"):
        assert same(plain(other[name].state_dict()), plain(trained[name].state_dict()))


def test_sharded_and_replicated_over_ranks(tmp_path: Path, checkpointer: SyncCheckpointer) -> None:
    whole, bias = torch.randn(90, 700), torch.randn(700)
    states = [
        {"w": shard(whole[30 * rank : 30 * rank + 30], (30 * rank, 0), whole.shape), "bias": bias} for rank in range(3)
    ]
    save_as_ranks(lambda: dcp.FileSystemWriter(tmp_path), states)
    assert len(list(tmp_path.glob("*.distcp"))) == 3
    loaded = checkpointer.load(tmp_path)
    assert torch.equal(loaded["w"], whole) and torch.equal(loaded["bias"], bias)


def test_a_part_and_other_dtypes(tmp_path: Path, state: State, checkpointer: SyncCheckpointer) -> None:
    dcp.save(state, checkpoint_id=tmp_path)
    some = checkpointer.load(tmp_path, keys=["big", "progress.*"])
    assert set(some) == {"big", "progress"} and torch.equal(some["big"], state["big"])
    target = {"half": torch.zeros(64, 700), "transposed": torch.zeros(200, 300).t()}
    checkpointer.load(tmp_path, target, cast="allow", strict=False)
    assert torch.equal(target["half"], state["half"].float()) and torch.equal(target["transposed"], state["transposed"])


def test_each_rank_for_itself(tmp_path: Path, checkpointer: SyncCheckpointer) -> None:
    """Without collectives each rank has metadata of its own; of names that several have, the lowest rank's counts."""
    dcp.save({"x": torch.ones(3), "n": 1}, checkpoint_id=tmp_path, use_collectives=False)
    other = tmp_path / "other"
    dcp.save({"x": torch.zeros(3), "y": torch.ones(2)}, checkpoint_id=other, use_collectives=False)
    for file in other.glob("__0*"):
        file.rename(tmp_path / file.name.replace("__0", "__1"))
    metadata = read_metadata(tmp_path / "__1.metadata")
    for info in metadata.storage_data.values():
        info.relative_path = info.relative_path.replace("__0", "__1")
    (tmp_path / "__1.metadata").write_bytes(pickle.dumps(metadata))
    loaded = checkpointer.load(tmp_path)
    assert loaded["n"] == 1 and loaded["x"].tolist() == [1, 1, 1] and loaded["y"].tolist() == [1, 1]


def test_a_flat_state_stays_flat_and_values_may_hold_tensors(tmp_path: Path, checkpointer: SyncCheckpointer) -> None:
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    inner = torch.randn(3)
    dcp.save({"a.b": torch.ones(2), "nested": {"x": inner, "y": [1]}}, checkpoint_id=tmp_path, planner=planner)
    loaded = checkpointer.load(tmp_path)
    assert (
        loaded["a.b"].tolist() == [1, 1] and torch.equal(loaded["nested"]["x"], inner) and loaded["nested"]["y"] == [1]
    )


class Custom:
    """What only running code brings back."""

    def __init__(self, value: int) -> None:
        self.value = value


def test_objects_take_allow_pickle(tmp_path: Path, checkpointer: SyncCheckpointer) -> None:
    dcp.save({"custom": Custom(3), "x": torch.ones(2)}, checkpoint_id=tmp_path)
    with pytest.raises(UnsupportedValue, match=r"'custom' was saved as a pickle.*allow_pickle=True"):
        checkpointer.load(tmp_path)
    assert checkpointer.load(tmp_path, keys=["x"])["x"].tolist() == [1, 1]
    assert checkpointer.load(tmp_path, allow_pickle=True)["custom"].value == 3


# ── damage ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_directory_of_something_else_is_no_checkpoint(tmp_path: Path, checkpointer: SyncCheckpointer) -> None:
    (tmp_path / "__0_0.distcp").write_bytes(b"x")
    with pytest.raises(CheckpointNotFound):
        checkpointer.load(tmp_path)


def test_missing_and_short_files(tmp_path: Path, checkpointer: SyncCheckpointer) -> None:
    dcp.save({"x": torch.ones(50_000)}, checkpoint_id=tmp_path)
    file = tmp_path / "__0_0.distcp"
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(CorruptCheckpoint, match=r"__0_0.distcp has \d+ bytes, and an entry ends beyond; it holds x"):
        checkpointer.load(tmp_path)
    file.unlink()
    with pytest.raises(CorruptCheckpoint, match=r"__0_0.distcp is missing; it holds x"):
        checkpointer.load(tmp_path)


@pytest.mark.parametrize("size", [100, 400_000], ids=["small", "large"])
@pytest.mark.parametrize("options", [{}, extension_options()], ids=["plain", "zstd"])
def test_a_flipped_bit_is_found(
    tmp_path: Path, checkpointer: SyncCheckpointer, size: int, options: dict[str, Any]
) -> None:
    dcp.save({"x": torch.randn(size)}, storage_writer=dcp.FileSystemWriter(tmp_path, **options))
    file = tmp_path / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match="x"):
        checkpointer.load(tmp_path)


def test_files_without_crcs_are_read(tmp_path: Path, checkpointer: SyncCheckpointer, state: State, same: Same) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        dcp.save(state, checkpoint_id=tmp_path)
    finally:
        torch.serialization.set_crc32_options(before)
    assert same(checkpointer.load(tmp_path), plain(state))


def test_an_entry_that_holds_another_tensor(tmp_path: Path, checkpointer: SyncCheckpointer) -> None:
    dcp.save({"x": torch.ones(4)}, checkpoint_id=tmp_path)
    for other in (torch.ones(5), torch.ones(4, dtype=torch.int32), [1, 2]):
        buffer = io.BytesIO()
        torch.save(other, buffer)
        put_entry(tmp_path, buffer.getvalue())
        with pytest.raises(CorruptCheckpoint, match=r"entry of x .* no torch.float32 of shape \[4\]"):
            checkpointer.load(tmp_path)


def test_a_large_entry_of_a_hostile_pickle_runs_nothing(tmp_path: Path, checkpointer: SyncCheckpointer) -> None:
    dcp.save({"x": torch.ones(50_000)}, checkpoint_id=tmp_path)
    file, marker = tmp_path / "__0_0.distcp", tmp_path / "marker"
    source = zipfile.ZipFile(file)
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as made:
        for info in source.infolist():
            hostile = pickle.dumps(Touch(marker)) if info.filename.endswith("data.pkl") else source.read(info)
            made.writestr(info.filename, hostile)
    file.write_bytes(target.getvalue().ljust(file.stat().st_size, b"\0"))
    with pytest.raises(CorruptCheckpoint):
        checkpointer.load(tmp_path)
    assert not marker.exists()


class Touch:
    """Unpickled without care, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_an_unknown_transform_is_named(tmp_path: Path, checkpointer: SyncCheckpointer) -> None:
    dcp.save({"x": torch.ones(4)}, checkpoint_id=tmp_path)
    metadata = read_metadata(tmp_path / ".metadata")
    metadata.storage_data[MetadataIndex("x", [0])].transform_descriptors = ["stream.rot13/1"]
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UnsupportedFormat, match=r"x was transformed by stream.rot13/1"):
        checkpointer.load(tmp_path)


@needs_extensions
def test_a_bomb_is_cut_off(tmp_path: Path, checkpointer: SyncCheckpointer) -> None:
    dcp.save({"x": torch.ones(4)}, storage_writer=dcp.FileSystemWriter(tmp_path, _extensions=torchs_zstd()))
    import zstandard

    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    put_entry(tmp_path, bomb)
    with pytest.raises(CorruptCheckpoint, match="longer than"):
        checkpointer.load(tmp_path)


def test_blank_differs(state: State, same: Same) -> None:
    assert not same(blank(state)["big"], state["big"])


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")  # torch 2.15's
def test_a_tensor_without_memory_is_no_memory(tmp_path: Path, checkpointer: SyncCheckpointer) -> None:
    """``weights_only`` makes meta and sparse tensors, too; the bytes at their address are nobody's."""
    dcp.save({"x": torch.ones(4), "v": {}}, checkpoint_id=tmp_path)
    for other in (torch.ones(4, device="meta"), torch.ones(4).to_sparse()):
        planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
        inside = tmp_path / "inside"
        dcp.save({"v": {"inner": other}}, checkpoint_id=inside, planner=planner)
        with pytest.raises((CorruptCheckpoint, UnsupportedValue), match=r"inner"):
            checkpointer.load(inside)
        for file in inside.iterdir():
            file.unlink()
        buffer = io.BytesIO()
        torch.save(other, buffer)
        put_entry(tmp_path, buffer.getvalue())
        with pytest.raises(CorruptCheckpoint, match=r"entry of x .* has no such bytes"):
            checkpointer.load(tmp_path)


def test_empty_shards(tmp_path: Path, checkpointer: SyncCheckpointer) -> None:
    """With fewer rows than ranks some ranks hold nothing, at the end of the tensor."""
    whole = torch.randn(2, 5)
    parts = [shard(whole[rank : rank + 1], (min(rank, 2), 0), whole.shape) for rank in range(4)]
    save_as_ranks(lambda: dcp.FileSystemWriter(tmp_path), [{"w": part} for part in parts])
    assert torch.equal(checkpointer.load(tmp_path)["w"], whole)
