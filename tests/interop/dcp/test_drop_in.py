"""The writer and the reader in the place of torch's, in ``dcp.save`` and ``dcp.load``."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from asyncdcp import SyncCheckpointer
from asyncdcp.errors import InvalidOption
from asyncdcp.interop.dcp import FileSystemReader, FileSystemWriter
from tests.interop.dcp.states import State, blank, files, save_as_ranks, shard
from tests.interop.dcp.torchs import extension_options, needs_extensions, torchs_zstd
from tests.interop.dcp.upstream import with_drop_in

Same = Callable[[Any, Any], bool]
Writer = Callable[..., Any]
Reader = Callable[..., Any]

OPTIONS: dict[str, Any] = {
    "default": {},
    "a file each": {"single_file_per_rank": False},
    "zstd": extension_options(),
    "threads": {"thread_count": 3},
}


@pytest.mark.parametrize("options", [OPTIONS["default"], OPTIONS["a file each"], OPTIONS["zstd"]])
def test_the_same_bytes_as_torch_writes(tmp_path: Path, state: State, options: dict[str, Any]) -> None:
    dcp.save(state, storage_writer=FileSystemWriter(tmp_path / "ours", **options))
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "torch's", **options))
    assert files(tmp_path / "ours") == files(tmp_path / "torch's")
    for file in (tmp_path / "torch's").glob("*.distcp"):
        assert (tmp_path / "ours" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        (FileSystemWriter, dcp.FileSystemReader),
        (dcp.FileSystemWriter, FileSystemReader),
        (FileSystemWriter, FileSystemReader),
    ],
    ids=["ours to torch's", "torch's to ours", "ours to ours"],
)
def test_either_reads_what_either_wrote(
    tmp_path: Path, state: State, same: Same, options: dict[str, Any], writer: Writer, reader: Reader
) -> None:
    dcp.save(state, storage_writer=writer(tmp_path, **options))
    target = blank(state)
    dcp.load(target, storage_reader=reader(tmp_path))
    assert same(target, state)


def test_sharded_tensors_are_resharded(tmp_path: Path) -> None:
    whole, bias = torch.randn(90, 700), torch.randn(700)
    states = [{"w": shard(whole[30 * rank :][:30], (30 * rank, 0), whole.shape), "bias": bias} for rank in range(3)]
    save_as_ranks(lambda: FileSystemWriter(tmp_path), states)
    assert files(tmp_path) == {".metadata", "__0_0.distcp", "__1_0.distcp", "__2_0.distcp"}
    for reader in (FileSystemReader, dcp.FileSystemReader):
        target: State = {"w": torch.zeros(90, 700), "bias": torch.zeros(700)}
        dcp.load(target, storage_reader=reader(tmp_path))
        assert torch.equal(target["w"], whole) and torch.equal(target["bias"], bias)
    rows, columns = torch.zeros(41, 700), torch.zeros(90, 33)
    dcp.load({"w": shard(rows, (20, 0), whole.shape)}, storage_reader=FileSystemReader(tmp_path))
    dcp.load({"w": shard(columns, (0, 600), whole.shape)}, storage_reader=FileSystemReader(tmp_path))
    assert torch.equal(rows, whole[20:61]) and torch.equal(columns, whole[:, 600:633])


def test_dtensors(tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (1,))
    whole = torch.randn(20, 30)

    def make(tensor: torch.Tensor) -> State:
        return {name: distribute_tensor(tensor, mesh, [place]) for name, place in (("s", Shard(1)), ("r", Replicate()))}

    dcp.save(make(whole), storage_writer=FileSystemWriter(tmp_path))
    target = make(torch.zeros(20, 30))
    dcp.load(target, storage_reader=FileSystemReader(tmp_path))
    assert all(isinstance(loaded, DTensor) and torch.equal(loaded.full_tensor(), whole) for loaded in target.values())


def test_partial_loads_and_missing_names(tmp_path: Path, state: State, same: Same) -> None:
    dcp.save(state, storage_writer=FileSystemWriter(tmp_path))
    target = {"big": torch.zeros(300, 1000), "progress": {"step": 0}}
    dcp.load(target, storage_reader=FileSystemReader(tmp_path))
    assert torch.equal(target["big"], state["big"]) and target["progress"] == {"step": 7}  # type: ignore[arg-type]
    with pytest.raises(CheckpointException, match="Missing key in checkpoint state_dict: other"):
        dcp.load({"other": torch.zeros(1)}, storage_reader=FileSystemReader(tmp_path))
    lenient = dcp.DefaultLoadPlanner(allow_partial_load=True)
    more = {"scalar": torch.zeros((), dtype=torch.float64), "other": torch.ones(1)}
    dcp.load(more, storage_reader=FileSystemReader(tmp_path), planner=lenient)
    assert more["scalar"].item() == 2.5 and more["other"].item() == 1


def test_targets_of_another_dtype_or_layout(tmp_path: Path, state: State) -> None:
    dcp.save(state, storage_writer=FileSystemWriter(tmp_path))
    target = {"half": torch.zeros(64, 700), "big": torch.zeros(1000, 300).t()}
    dcp.load(target, storage_reader=FileSystemReader(tmp_path))
    assert torch.equal(target["half"], state["half"].float()) and torch.equal(target["big"], state["big"])


class Doubling(dcp.DefaultLoadPlanner):
    """Loads into tensors made for the occasion."""

    def resolve_tensor(self, read_item: Any) -> torch.Tensor:
        return torch.empty_like(super().resolve_tensor(read_item))

    def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
        super().resolve_tensor(read_item).copy_(2 * tensor)


def test_any_planner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncdcp.interop.dcp.reader._BATCH_BYTES", 1000)
    flat = dcp.DefaultSavePlanner(flatten_state_dict=False)
    state = {f"{n}": torch.full((n, 40), float(n)) for n in range(1, 9)}
    dcp.save({**state, "nested": {"x": 1}}, storage_writer=FileSystemWriter(tmp_path), planner=flat)
    target: State = {**blank(state), "nested": None}
    reader = FileSystemReader(tmp_path)
    dcp.load(target, storage_reader=reader, planner=Doubling(flatten_state_dict=False, flatten_sharded_tensors=False))
    assert all(torch.equal(target[name], 2 * tensor) for name, tensor in state.items())
    assert target["nested"] == {"x": 1}


def test_planners_that_cache(tmp_path: Path) -> None:
    """The plan of the first save, prefix and all, is used again, for another directory and for the same one."""
    planner = dcp.DefaultSavePlanner
    try:
        for step in range(3):
            state = {"x": torch.full((3,), float(step)), "step": step}
            for place in (tmp_path / str(step), tmp_path / "same"):
                writer = FileSystemWriter(place, overwrite=True)
                if step and place.name == "same":
                    with pytest.warns(UserWarning, match="existing checkpoint"):
                        dcp.save(state, storage_writer=writer, planner=planner(enable_plan_caching=True))
                else:
                    dcp.save(state, storage_writer=writer, planner=planner(enable_plan_caching=True))
                target: State = {"x": torch.zeros(3), "step": -1}
                dcp.load(target, storage_reader=dcp.FileSystemReader(place))
                assert target["x"].tolist() == [step] * 3 and target["step"] == step
    finally:
        for cache in (name for name in vars(dcp.SavePlanner) if name.startswith("_cached")):
            getattr(dcp.SavePlanner, cache).clear()


def test_without_coordination_and_without_a_group(tmp_path: Path) -> None:
    state = {"x": torch.randn(100), "n": 3}
    dcp.save(state, storage_writer=FileSystemWriter(tmp_path), use_collectives=False)
    assert files(tmp_path) == {"__0.metadata", "__0_0.distcp"}
    for reader in (FileSystemReader, dcp.FileSystemReader):
        target = {"x": torch.zeros(100), "n": 0}
        dcp.load(target, storage_reader=reader(tmp_path))
        assert torch.equal(target["x"], state["x"]) and target["n"] == 3  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.save(state, storage_writer=FileSystemWriter(tmp_path / "alone"), no_dist=True)
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.load(target, storage_reader=FileSystemReader(tmp_path / "alone"), no_dist=True)


class Inverted:
    """Turns every bit over: an extension that only a registry knows."""

    @staticmethod
    def registry_name() -> str:
        return "stream.inverted"

    @classmethod
    def from_descriptor(cls, version: str) -> Inverted:
        return cls()

    def get_descriptor(self) -> str:
        return "stream.inverted/1"

    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        class To(io.RawIOBase):
            def write(self, data: Any) -> int:
                return output.write(bytes(255 - byte for byte in memoryview(data).cast("B")))

            def close(self) -> None:
                output.close()

        return To()  # type: ignore[return-value]

    def transform_from(self, input: IO[bytes]) -> IO[bytes]:
        return io.BytesIO(bytes(255 - byte for byte in input.read()))


@needs_extensions
def test_extensions_of_a_registry_in_their_order(tmp_path: Path) -> None:
    from torch.distributed.checkpoint._extension import ExtensionRegistry, StreamTransformExtension

    class Turning(Inverted, StreamTransformExtension):  # type: ignore[misc]  # what from_descriptor returns is one
        pass

    registry = ExtensionRegistry()
    registry.register(Turning)
    state = {"x": torch.randn(50), "n": [1]}
    for extensions in ([Turning()], [*torchs_zstd(), Turning()], [Turning(), *torchs_zstd()]):
        place = tmp_path / str(len(files(tmp_path)))
        dcp.save(state, storage_writer=FileSystemWriter(place, _extensions=extensions))
        for reader in (FileSystemReader, dcp.FileSystemReader):
            target = {"x": torch.zeros(50), "n": None}
            dcp.load(target, storage_reader=reader(place, _extension_registry=registry))
            assert torch.equal(target["x"], state["x"]) and target["n"] == [1]  # type: ignore[arg-type]


def test_checkpoint_id_instead_of_a_path(tmp_path: Path) -> None:
    writer, reader = FileSystemWriter("unused"), FileSystemReader("unused")
    dcp.save({"x": torch.ones(3)}, checkpoint_id=tmp_path / "a", storage_writer=writer)
    target = {"x": torch.zeros(3)}
    dcp.load(target, checkpoint_id=tmp_path / "a", storage_reader=reader)
    assert target["x"].tolist() == [1, 1, 1] and writer.checkpoint_id == reader.checkpoint_id == tmp_path / "a"
    assert FileSystemWriter.validate_checkpoint_id(tmp_path) and not FileSystemReader.validate_checkpoint_id("s3://a/b")


def test_asyncdcp_opens_it_too(tmp_path: Path, state: State, same: Same) -> None:
    dcp.save(state, storage_writer=FileSystemWriter(tmp_path))
    with SyncCheckpointer(process=False) as checkpointer:
        target = blank(state)
        checkpointer.load(tmp_path, target)
    assert same(target, state)


def test_an_empty_state(tmp_path: Path) -> None:
    dcp.save({}, storage_writer=FileSystemWriter(tmp_path / "a" / "b"))
    dcp.load({}, storage_reader=dcp.FileSystemReader(tmp_path / "a" / "b"))


# ── asynchronous ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("cached", [False, True])
def test_async_save_on_a_thread(tmp_path: Path, cached: bool) -> None:
    writer = FileSystemWriter(tmp_path / "0", cache_staged_state_dict=cached)
    for step in range(3):
        x = torch.full((1000,), float(step))
        saved = dcp.async_save({"x": x, "step": step}, checkpoint_id=tmp_path / str(step), storage_writer=writer)
        x.fill_(-1)  # it was staged when async_save returned
        assert isinstance(saved, Future)
        saved.result()
    for step in range(3):
        target: State = {"x": torch.zeros(1000), "step": -1}
        dcp.load(target, storage_reader=dcp.FileSystemReader(tmp_path / str(step)))
        assert target["x"].eq(step).all() and target["step"] == step


def test_the_writer_travels_without_what_it_staged(tmp_path: Path) -> None:
    writer = FileSystemWriter(tmp_path, thread_count=2, cache_staged_state_dict=True, _extensions=torchs_zstd())
    writer.stage({"x": torch.ones(100_000)})
    data = pickle.dumps(writer)
    assert len(data) < 2000
    made = pickle.loads(data)  # noqa: S301  # the test's own
    dcp.save({"x": torch.ones(3)}, storage_writer=made)
    assert made.path == tmp_path and made.thread_count == 2 and made.save_id


# ── options ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="thread_count is 0"):
        FileSystemWriter(tmp_path, thread_count=0)
    formats = dcp.filesystem.SerializationFormat
    FileSystemWriter(tmp_path, serialization_format=formats.TORCH_SAVE)
    assert FileSystemWriter(tmp_path, serialization_format=formats.SAFETENSORS).is_own_format


def test_torchs_own_tests_get_the_drop_in() -> None:
    source = "import torch\nfrom torch.distributed.checkpoint import (\n    FileSystemReader,\n    load,\n)\n"
    changed = with_drop_in(source)
    assert changed == source + "from asyncdcp.interop.dcp import FileSystemReader\n"
    with pytest.raises(ValueError, match="does not import"):
        with_drop_in("from torch.distributed.checkpoint import load\n")
