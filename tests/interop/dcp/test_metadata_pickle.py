"""Pickles that pass for ``.metadata``: what is not DCP's own is refused, and nothing is changed for good."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorProperties

from asyncdcp import SyncCheckpointer
from asyncdcp.errors import CorruptCheckpoint
from asyncdcp.interop.dcp.metadata_file import load_metadata
from tests.interop.dcp.states import State


def stored(path: Path, state: State) -> bytes:
    dcp.save(state, checkpoint_id=path)
    return (path / ".metadata").read_bytes()


@pytest.mark.parametrize("protocol", range(2, 6))
def test_what_stock_torch_writes_is_read(tmp_path: Path, state: State, protocol: int) -> None:
    expected = pickle.loads(stored(tmp_path, state))  # noqa: S301  # the test's own
    found = load_metadata(pickle.dumps(expected, protocol=protocol), "m")
    assert type(found) is Metadata and found.storage_meta is not None
    expected.storage_meta.checkpoint_id = found.storage_meta.checkpoint_id
    assert found == expected and found.storage_meta.checkpoint_id == str(tmp_path)
    assert all(type(index) is MetadataIndex for index in found.storage_data)


@pytest.mark.parametrize("strides", [(), ((8, 1),), (None,)], ids=["none", "torch 2.15's", "unknown"])
def test_with_strides_and_without(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch, strides: tuple[Any, ...]
) -> None:
    expected = pickle.loads(stored(tmp_path, state))  # noqa: S301  # the test's own
    plain = TensorProperties.__getstate__
    monkeypatch.setattr(TensorProperties, "__getstate__", lambda self: plain(self)[:5] + strides)
    found = load_metadata(pickle.dumps(expected), "m")
    assert found.state_dict_metadata.keys() == expected.state_dict_metadata.keys()
    monkeypatch.setattr(TensorProperties, "__getstate__", lambda self: (*plain(self)[:5], ("odd",)))
    if "strides" in TensorProperties.__dataclass_fields__:
        with pytest.raises(CorruptCheckpoint, match="odd strides"):
            load_metadata(pickle.dumps(expected), "m")


class Calls:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


MARKER = "asyncdcp-was-here"
RUNS = f"__import__('os').environ.__setitem__({MARKER!r}, '1')"


def raw(*lines: str) -> bytes:
    """A pickle of protocol 0 opcodes."""
    return b"".join(line.encode() for line in lines)


HOSTILE: dict[str, bytes] = {
    "os.system": pickle.dumps(Calls(os.system, "true")),
    "eval": pickle.dumps(Calls(eval, RUNS)),
    "exec by an old opcode": raw("(S", repr(RUNS), "\ni__builtin__\nexec\n."),
    "getattr": raw("c__builtin__\ngetattr\n(ctorch\nSize\nS'__base__'\ntR."),
    "a module's attribute by dots": raw("\x80\x04\x8c\x05torch\x8c\x09os.system\x93."),
    "torch's own loader": raw("ctorch.storage\n_load_from_bytes\n(S'x'\ntR."),
    "torch's own code": raw("ctorch\nhub.load\n(S'x'\ntR."),
    "DCP's own other class": raw("ctorch.distributed.checkpoint.filesystem\nFileSystemWriter\n(S'x'\ntR."),
    "an object inside of a good one": pickle.dumps(Metadata({}, planner_data=Calls(eval, RUNS), storage_data={})),
    "import of nothing": raw("cno_such_module\nname\n."),
    "a persistent id": raw("Pid\n."),
    "an extension code": raw("\x80\x02\x82\x01."),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_pickles_are_refused(data: bytes, tmp_path: Path) -> None:
    os.environ.pop(MARKER, None)
    with pytest.raises(CorruptCheckpoint, match=r"x: (its pickle asks for|not a metadata pickle)"):
        load_metadata(data, "x")
    (tmp_path / ".metadata").write_bytes(data)
    with SyncCheckpointer(process=False) as checkpointer, pytest.raises(CorruptCheckpoint):
        checkpointer.load(tmp_path)
    assert MARKER not in os.environ


KINDS = [
    *((metadata, kind) for kind in ("Metadata", "MetadataIndex", "TensorProperties", "BytesStorageMetadata")),
    *((metadata, kind) for kind in ("TensorStorageMetadata", "ChunkStorageMetadata", "StorageMeta")),
    *((metadata, "_MEM_FORMAT_ENCODING"), (filesystem, "_StorageInfo"), (torch, "Size"), (torch, "float32")),
    (torch.serialization, "_get_layout"),
]


@pytest.mark.parametrize(("module", "name"), KINDS, ids=lambda part: getattr(part, "__name__", part))
@pytest.mark.parametrize("slots", [False, True])
def test_no_class_can_be_changed_by_a_pickle(module: Any, name: str, slots: bool) -> None:
    """``BUILD`` on a class itself would set its attributes, for everyone and for good."""
    kind = getattr(module, name)
    before = dict(getattr(kind, "__dict__", {}))
    state = ["(", "N", "(S'harmed'\nS'yes'\nd", "t"] if slots else ["(S'harmed'\nS'yes'\nd"]
    with pytest.raises(CorruptCheckpoint):
        load_metadata(raw(f"c{module.__name__}\n{name}\n", *state, "b."), "x")
    assert not hasattr(kind, "harmed") and dict(getattr(kind, "__dict__", {})) == before


def test_no_enum_member_can_be_changed() -> None:
    with pytest.raises(CorruptCheckpoint):
        load_metadata(raw(f"c{metadata.__name__}\n_MEM_FORMAT_ENCODING\n(I0\ntR(S'_value_'\nI7\ndb."), "x")
    assert metadata._MEM_FORMAT_ENCODING(0).value == 0


def broken(change: Callable[[Metadata], object], path: Path) -> bytes:
    found = pickle.loads(stored(path, {"x": torch.ones(4, 4), "v": 1}))  # noqa: S301  # the test's own
    change(found)
    return pickle.dumps(found)


def located(found: Metadata) -> Any:
    return found.storage_data[MetadataIndex("x", [0, 0])]


CHANGES: dict[str, Callable[[Metadata], object]] = {
    "no metadata": lambda found: setattr(found, "state_dict_metadata", None),
    "an odd name": lambda found: found.state_dict_metadata.update({3: found.state_dict_metadata["x"]}),  # type: ignore[dict-item]
    "an odd entry": lambda found: found.state_dict_metadata.update(x=3),  # type: ignore[call-overload]
    "a shape of text": lambda found: setattr(found.state_dict_metadata["x"], "size", "ab"),
    "a negative shape": lambda found: setattr(found.state_dict_metadata["x"], "size", torch.Size([-1, 4])),
    "other dimensions": lambda found: setattr(found.state_dict_metadata["x"], "size", torch.Size([4])),
    "no chunks": lambda found: setattr(found.state_dict_metadata["x"], "chunks", None),
    "a path upward": lambda found: setattr(located(found), "relative_path", "../other"),
    "an absolute path": lambda found: setattr(located(found), "relative_path", "/etc/passwd"),
    "a negative offset": lambda found: setattr(located(found), "offset", -1),
    "a length of text": lambda found: setattr(located(found), "length", "5"),
    "odd transforms": lambda found: setattr(located(found), "transform_descriptors", [3]),
    "an odd location": lambda found: found.storage_data.update({MetadataIndex("x", [0, 0]): 3}),
    "odd paths": lambda found: found.planner_data.update(x=(None,)),
    "an odd version": lambda found: setattr(found, "version", 3),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_malformed_metadata_is_refused(change: Callable[[Metadata], object], tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match="x: "):
        load_metadata(broken(change, tmp_path), "x")


ABSENT: dict[str, Callable[[Metadata], object]] = {
    "a hole": lambda found: found.state_dict_metadata["x"].chunks.clear(),  # type: ignore[union-attr]
    "no location": lambda found: found.storage_data.pop(MetadataIndex("x", [0, 0])),
    "beyond the file": lambda found: setattr(located(found), "length", 1 << 40),
    "another name's place": lambda found: found.planner_data.update(x=("v",)),
    "within another name": lambda found: found.planner_data.update(x=("v", "x")),
    "a list without end": lambda found: found.planner_data.update(x=("list", 1 << 40)),
    "a path without end": lambda found: found.planner_data.update(x=("a",) * 5000),
    "a dict and a list": lambda found: found.planner_data.update(x=("a", "b"), v=("a", 0)),
}


@pytest.mark.parametrize("change", ABSENT.values(), ids=ABSENT)
def test_metadata_that_does_not_fit_the_files_is_refused(change: Callable[[Metadata], object], tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(broken(change, tmp_path))
    with SyncCheckpointer(process=False) as checkpointer, pytest.raises(CorruptCheckpoint):
        checkpointer.load(tmp_path)


def test_cut_short_anywhere(tmp_path: Path) -> None:
    data = stored(tmp_path, {"x": torch.ones(3)})
    for end in range(0, len(data), 13):
        with pytest.raises(CorruptCheckpoint):
            load_metadata(data[:end], "x")
