"""Saves and loads that come to nothing."""

from __future__ import annotations

import errno
import functools
import threading
from typing import Any
from unittest import mock

import torch
from anyio import to_thread

from asyncdcp import AESGCM, AsyncCheckpointer, CheckpointManager, KeepLast, MemoryStorage, Options, SyncCheckpointer
from asyncdcp.interop.dcp.metadata_file import load_metadata
from asyncdcp.staging import SlabCopier
from asyncdcp.storage import MemoryPlace
from tests.error_cases.cases import case, load, managed, save
from tests.extensions.samples import Xor


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
