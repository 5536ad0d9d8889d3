"""Every refusal and mismatch, made for real, and README's table of them.

``python -m tests.test_errors_table`` prints the table anew.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import sys
import threading
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from anyio import to_thread
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from asyncdcp import (
    AESGCM,
    AsyncCheckpointer,
    CheckpointManager,
    KeepLast,
    MemoryStorage,
    Options,
    RNGState,
    SyncCheckpointer,
)
from asyncdcp.errors import AsyncDCPError
from asyncdcp.interop.dcp.metadata_pickle import load_metadata
from asyncdcp.memory_limits import Headroom
from asyncdcp.pipeline.descriptions import Viewer
from asyncdcp.planning.division import divide
from asyncdcp.planning.holdings import Holdings
from asyncdcp.staging import SlabCopier
from asyncdcp.state_dict.values import WAY_OUT
from asyncdcp.storage import MemoryPlace
from tests.extensions.samples import Xor

_README = Path(__file__).parents[1] / "README.md"
_BEGIN, _END = "<!-- errors: begin -->\n", "<!-- errors: end -->\n"
_LENGTH = 180
_HEADS = {
    "save": "A state that cannot be saved",
    "mismatch": "A state that a checkpoint does not fit",
    "call": "A call that cannot be carried out",
    "failure": "A save or load that comes to nothing",
}

CASES: list[tuple[str, str, Callable[[], object]]] = []
"""Section, cause, and what raises the error."""


def case(section: str, cause: str) -> Callable[[Callable[[], object]], Callable[[], object]]:
    """Adds a row."""

    def add(make: Callable[[], object]) -> Callable[[], object]:
        CASES.append((section, cause, make))
        return make

    return add


def save(state: Any, **options: Any) -> MemoryStorage:
    """A storage that holds a checkpoint of ``state``."""
    storage = MemoryStorage("run/step_9")
    with SyncCheckpointer(process=False) as checkpointer:
        checkpointer.save(storage, state, **options)
    return storage


def load(storage: MemoryStorage, *target: Any, **options: Any) -> Any:
    with SyncCheckpointer(process=False) as checkpointer:
        return checkpointer.load(storage, *target, **options)


# ── states that cannot be saved ─────────────────────────────────────────────────────────────────────────────────────


class Opaque(Tensor):
    """A wrapper that does not say what it consists of."""

    @staticmethod
    def __new__(cls) -> Opaque:
        made: Opaque = Tensor._make_wrapper_subclass(cls, (2,))
        return made

    @classmethod
    def __torch_dispatch__(cls, *_: Any) -> Any:
        raise NotImplementedError


class Contextual(TwoTensor):
    """Puts a tensor where only its description belongs."""

    def __tensor_flatten__(self) -> Any:
        return ["a"], torch.ones(1)


def _freed() -> Tensor:
    tensor = torch.ones(4)
    tensor.untyped_storage().resize_(0)
    return tensor


def _quantized() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


def _nested() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(1)])


def _attributed() -> Any:
    ordered: Any = OrderedDict(a=torch.ones(1))
    ordered.note = "lost"
    return ordered


def _cycle() -> Any:
    state: dict[str, Any] = {}
    state["self"] = state
    return state


def _deep() -> Any:
    state: Any = torch.ones(1)
    for _ in range(101):
        state = [state]
    return state


_UNSUPPORTED: list[tuple[str, Callable[[], Any]]] = [
    ("an object of a class of your own", object),
    ("a class or a function", lambda: nn.ReLU),
    ("a sparse tensor", lambda: torch.eye(2).to_sparse()),
    ("a quantized tensor", _quantized),
    ("a nested tensor", _nested),
    ("a tensor on the meta device", lambda: torch.ones(2, device="meta")),
    ("a tensor whose memory was freed (FSDP)", _freed),
    ("a tensor under a functional transform", lambda: torch._to_functional_tensor(torch.ones(2))),
    ("a tensor subclass that cannot be flattened", Opaque),
    ("a subclass with a tensor in its context", lambda: Contextual(torch.ones(2), torch.ones(2))),
    ("a tensor in a set or deque", lambda: {torch.ones(1)}),
    ("a defaultdict with a factory of your own", lambda: defaultdict(threading.Event)),
    ("an OrderedDict with attributes", _attributed),
    ("a key of another type", lambda: {b"key": 1}),
    ("a container that holds itself", _cycle),
    ("more than 100 levels", _deep),
]
for _cause, _make in _UNSUPPORTED:
    case("save", _cause)(functools.partial(lambda make: save({"x": make()}), _make))


@case("save", "two entries of one name")
def _duplicate() -> None:
    save({"a": {"b": 1}, "a.b": 2})


@case("save", "metadata= that is not JSON")
def _metadata() -> None:
    save({"x": 1}, metadata={"when": object()})


@case("save", "keys= that match nothing")
def _save_keys() -> None:
    save({"model": 1}, keys=["net.*"])


# ── mismatches ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _meta_model() -> nn.Module:
    with torch.device("meta"):
        return nn.Linear(2, 2)


_MISMATCHES: list[tuple[str, Callable[[], tuple[Any, Any]]]] = [
    ("the state has more", lambda: ({"x": 1, "weight": torch.ones(1)}, {"x": 1})),
    ("the checkpoint has more", lambda: ({"x": 1}, {"x": 1, "weight": torch.ones(1)})),
    ("a name is spelled otherwise", lambda: ({"weight": torch.ones(1)}, {"weights": torch.ones(1)})),
    ("another shape", lambda: ({"x": torch.ones(2)}, {"x": torch.ones(3)})),
    ("another dtype", lambda: ({"x": torch.ones(2)}, {"x": torch.ones(2).half()})),
    ("a tensor, and a value in the checkpoint", lambda: ({"x": torch.ones(1)}, {"x": 1})),
    ("a value, and a tensor in the checkpoint", lambda: ({"x": 1}, {"x": torch.ones(1)})),
    ("a target on the meta device", lambda: ({"m": _meta_model()}, {"m": nn.Linear(2, 2)})),
    ("a target that was expanded", lambda: ({"x": torch.ones(1).expand(3)}, {"x": torch.ones(3)})),
    ("another tensor subclass", lambda: ({"x": torch.ones(2)}, {"x": TwoTensor(torch.ones(2), torch.ones(2))})),
    ("a module that refuses its state", lambda: ({"m": Strange()}, {"m": Strange()})),
]


class Strange(nn.Linear):
    def __init__(self) -> None:
        super().__init__(1, 1)

    def load_state_dict(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("not today")


for _cause, _pair in _MISMATCHES:
    case("mismatch", _cause)(functools.partial(lambda pair: load(save(pair()[1]), pair()[0]), _pair))


@case("mismatch", "a subclass that the state does not have")
def _no_subclass() -> None:
    load(save({"x": TwoTensor(torch.ones(2), torch.ones(2))}))


@case("mismatch", "load(keys=) that match nothing")
def _load_keys() -> None:
    load(save({"model": 1}), {"model": 2}, keys=["net.*"])


@case("mismatch", "a pickle, and no allow_pickle")
def _pickle() -> None:
    load(save({"f": nn.ReLU}, allow_pickle=True))


@case("mismatch", "an RNGState without its generators")
def _rng() -> None:
    RNGState().load_state_dict({"torch": torch.get_rng_state()})


# ── calls ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@case("call", "no checkpoint at the path")
def _not_found() -> None:
    load(MemoryStorage("run/step_9"))


@case("call", "a checkpoint is there already")
def _exists() -> None:
    storage = save({"x": 1})
    with SyncCheckpointer(process=False) as checkpointer:
        checkpointer.save(storage, {"x": 2})


@case("call", "an option that means nothing")
def _option() -> None:
    Options(when_busy="never")  # type: ignore[arg-type]  # that is the point


@case("call", "a package that an extra brings is missing")
def _missing() -> None:
    gone = ModuleNotFoundError("No module named 'obstore'")
    with (
        mock.patch("asyncdcp.storage.import_module", side_effect=gone),
        SyncCheckpointer(process=False) as checkpointer,
    ):
        checkpointer.load("s3://bucket/run/step_1")


@case("call", "keys= that is one string")
def _one_key() -> None:
    load(save({"x": 1}), keys="model.*")


@case("call", "guard() of what has no step hook")
def _guard() -> None:
    with AsyncCheckpointer(process=False) as checkpointer:
        checkpointer.guard(nn.Linear(1, 1))  # type: ignore[arg-type]  # that is the point


def managed(place: MemoryPlace, **options: Any) -> CheckpointManager:
    return CheckpointManager(place, process=False, takeover_seconds=0, **options)


@case("call", "a step that the run has, or one before")
def _old_step() -> None:
    with managed(MemoryPlace("run")) as manager:
        manager.save(9, {"x": 1}).result()
        manager.save(9, {"x": 1})


@case("call", "a step that the run does not have")
def _no_step() -> None:
    with managed(MemoryPlace("run")) as manager:
        manager.save(9, {"x": 1}).result()
        manager.restore(5, {"x": 1}).result()


@case("call", "a save by a manager that only reads")
def _read_only() -> None:
    with managed(MemoryPlace("run"), read_only=True) as manager:
        manager.save(9, {"x": 1})


@case("call", "a call after close()")
def _closed() -> None:
    checkpointer = SyncCheckpointer(process=False)
    checkpointer.close()
    checkpointer.save(MemoryStorage(), {"x": 1})


@case("call", "a launched process, and no process group yet")
def _launched() -> None:
    os.environ["WORLD_SIZE"] = "4"
    try:
        SyncCheckpointer(process=False)
    finally:
        del os.environ["WORLD_SIZE"]


@case("call", "what differs by rank, and no PerRank")
def _replicas() -> None:
    divide([Holdings.of([], [], [], [], {"data.position": digest}) for digest in (b"1", b"2")])


@case("call", "PerRank values of another number of ranks")
def _other_world() -> None:
    index = SimpleNamespace(plan=SimpleNamespace(own=["rng.torch", "rng.python"]))
    Viewer(0, 2, "error").looks_as(4, [index], "run/step_9")  # type: ignore[list-item]  # all that it looks at


@case("call", "close() in a done callback")
def _deadlock() -> None:
    found: list[BaseException] = []
    seen = threading.Event()

    def close(_: object) -> None:
        try:
            checkpointer.close()
        except AsyncDCPError as error:
            found.append(error)
        seen.set()

    with AsyncCheckpointer(process=False) as checkpointer:
        checkpointer.save(MemoryStorage(), {"x": 1}).add_done_callback(close)
        seen.wait(30)
    raise found[0]


@case("call", "more memory than there is")
def _memory() -> None:
    with mock.patch("asyncdcp.memory_limits.tightest", lambda *_: Headroom(1 << 20, "MemAvailable")):
        save({"x": torch.zeros(1).expand(1 << 24)})


# ── failures ────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Stuck(MemoryStorage):
    """Writes nothing until it is let go."""

    def __init__(self) -> None:
        super().__init__("run/step_9")
        self.release = threading.Event()

    async def create(self, name: str, length_hint: int) -> Any:
        await to_thread.run_sync(self.release.wait, 30, abandon_on_cancel=True)
        return await super().create(name, length_hint)


def _while_busy(when_busy: Any) -> None:
    storage = _Stuck()
    with AsyncCheckpointer(Options(when_busy=when_busy), process=False) as checkpointer:
        first = checkpointer.save(storage, {"x": 1})
        try:
            checkpointer.save(MemoryStorage("run/step_10"), {"x": 1}).result()
        finally:
            storage.release.set()
            first.result()


case("failure", 'an earlier save, and when_busy="error"')(functools.partial(_while_busy, "error"))
case("failure", 'an earlier save, and when_busy="skip"')(functools.partial(_while_busy, "skip"))


@case("failure", "a tensor changed before staged")
def _torn() -> None:
    copy, tensor = SlabCopier.copy, torch.ones(4)

    def late(self: SlabCopier, *args: Any) -> None:
        tensor.add_(1)
        copy(self, *args)

    with mock.patch.object(SlabCopier, "copy", late):
        save({"model": {"weight": tensor}})


@case("failure", "a save that takes too long")
def _late() -> None:
    storage = _Stuck()
    with AsyncCheckpointer(Options(save_deadline=0.05), process=False) as checkpointer:
        try:
            checkpointer.save(storage, {"x": torch.ones(1)}).result()
        finally:
            storage.release.set()


@case("failure", "a save that is cancelled")
def _cancelled() -> None:
    storage = _Stuck()
    with AsyncCheckpointer(process=False) as checkpointer:
        handle = checkpointer.save(storage, {"x": torch.ones(1)})
        handle.cancel()
        storage.release.set()
        handle.result()


class _Failing(MemoryStorage):
    async def create(self, name: str, length_hint: int) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", name)


@case("failure", "a storage that fails")
def _full() -> None:
    with SyncCheckpointer(process=False) as checkpointer:
        checkpointer.save(_Failing("run/step_9"), {"x": torch.ones(1)})


@case("failure", "a run that another writer has opened since")
def _fenced() -> None:
    place = MemoryPlace("run")
    with managed(place) as older, managed(place):
        older.restore_latest({"x": 1}).result()


@case("failure", "a checkpoint that retention has deleted")
def _gone() -> None:
    with managed(MemoryPlace("run"), keep=KeepLast(1)) as manager:
        manager.save(8, {"x": 1}).result()
        (listed,) = manager.checkpoints().result()
        manager.save(9, {"x": 1}).result()
        manager.wait().result()
        manager.load(listed).result()


@case("failure", "a failure that nobody looked at")
def _unseen() -> None:
    with AsyncCheckpointer(process=False) as checkpointer:
        checkpointer.save(_Failing("run/step_9"), {"x": torch.ones(1)})


def _damage(ending: str, position: int) -> None:
    storage = save({"weight": torch.ones(100)})
    objects = storage._objects
    name = next(name for name in objects if name.endswith(ending))
    data = bytearray(objects[name])
    data[position] ^= 1
    objects[name] = bytes(data)
    load(storage)


case("failure", "a damaged data file")(functools.partial(_damage, ".safetensors", -8))
case("failure", "a damaged index")(functools.partial(_damage, ".index.json", -8))


def _encrypted(*, key: bytes) -> None:
    storage = MemoryStorage("run/step_9")
    with SyncCheckpointer(process=False, extensions=[AESGCM(b"k" * 32)]) as checkpointer:
        checkpointer.save(storage, {"x": torch.ones(1)})
    with SyncCheckpointer(process=False, extensions=[AESGCM(key)] if key else []) as checkpointer:
        checkpointer.load(storage)


case("failure", "an encrypted checkpoint and no key")(functools.partial(_encrypted, key=b""))
case("failure", "an encrypted checkpoint and another key")(functools.partial(_encrypted, key=b"x" * 32))


@case("failure", "a run whose newest checkpoint hides its metadata, and no key")
def _hidden() -> None:
    place = MemoryPlace("run")
    secret = [AESGCM(b"k" * 32, hide_metadata=True)]
    with CheckpointManager(place, process=False, takeover_seconds=0.0, extensions=secret) as manager:
        manager.save(9, {"x": torch.ones(1)})
    with CheckpointManager(place, process=False, takeover_seconds=0.0):
        pass


@case("failure", "a checkpoint of an extension that is not there")
def _unknown_extension() -> None:
    storage = MemoryStorage("run/step_9")
    with SyncCheckpointer(process=False, extensions=[Xor()]) as checkpointer:
        checkpointer.save(storage, {"x": torch.ones(1)})
    load(storage)


@case("failure", "a DCP checkpoint whose pickle is hostile")
def _hostile() -> None:
    load_metadata(b"cos\nsystem\n(S'true'\ntR.", "dcp/step_9/.metadata")


# ── the table ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _shortened(message: str) -> str:
    lines = message.splitlines()
    listed = [number for number, line in enumerate(lines) if line.startswith("    ")]
    if listed:  # a list of lists: its first entry, and the head over it without its number
        head, entry = lines[listed[0] - 1].strip().rpartition(": ")[0], lines[listed[0]].strip()
    text = f"… {head}: {entry}" if listed else lines[0].replace(WAY_OUT, "…")
    text = re.sub(r"(\[0\]){3,}", "[0][0]…", text)
    text = re.sub(r" \(byte \d+\)", "", text)
    text = re.sub(r"\b[0-9a-f]{12,}\b", "<id>", text)
    text = re.sub(r"\b(tests\.)?(test_errors_table|__main__)\.", "your.", text).replace("|", "\\|")
    if len(text) > _LENGTH:
        text = text[:_LENGTH].rsplit(" ", 1)[0].rstrip(",;:.") + " …"
    return f"`{text}`"


def _row(cause: str, make: Callable[[], object]) -> str:
    try:
        make()
    except AsyncDCPError as error:
        return f"| {cause} | `{type(error).__name__}` | {_shortened(str(error))} |\n"
    raise AssertionError(f"{cause}: nothing was raised")


def table() -> str:
    """All rows, as README holds them."""
    text = ""
    for section, head in _HEADS.items():
        rows = [_row(cause, make) for part, cause, make in CASES if part == section]
        text += f"\n| {head} | error | message, shortened |\n|---|---|---|\n{''.join(rows)}"
    return text + "\n"


@pytest.mark.parametrize(("section", "cause", "make"), CASES, ids=[cause for _, cause, _ in CASES])
def test_the_readme_has_it(section: str, cause: str, make: Callable[[], object]) -> None:
    listed = _README.read_text(encoding="utf-8").partition(_BEGIN)[2].partition(_END)[0]
    assert _row(cause, make) in listed.splitlines(keepends=True)


def test_the_readme_has_no_other() -> None:
    listed = _README.read_text(encoding="utf-8").partition(_BEGIN)[2].partition(_END)[0]
    causes = re.findall(r"^\| (.*?) \| `", listed, re.MULTILINE)
    assert causes == [cause for section in _HEADS for part, cause, _ in CASES if part == section]


if __name__ == "__main__":
    sys.stdout.write(_BEGIN + table() + _END)
