"""Checkpointers from elsewhere. Neither syncs what it wrote."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, ClassVar

from tests.benchmarks.peers.peer import sync


class TorchSnapshot:
    """``Snapshot.async_take``: returns when all is staged; a thread writes."""

    key: ClassVar[str] = "torchsnapshot"
    name: ClassVar[str] = "torchsnapshot + fsync"
    needs: ClassVar[str] = "torchsnapshot"
    runs_a_loop: ClassVar[bool] = True

    def __init__(self, source: Any, target: Any) -> None:
        from torchsnapshot import Snapshot, StateDict

        self._kind: Any = Snapshot
        self._source = {"state": StateDict(**source)}
        self._target = {"state": StateDict(**target)}
        self._pending: Any = None
        self._folder = Path()

    def begin(self, folder: Path) -> None:
        self._folder = folder
        self._pending = self._kind.async_take(str(folder), self._source)

    def staged(self) -> None:
        pass

    def done(self) -> bool:
        return bool(self._pending.done())

    def finish(self) -> None:
        self._pending.wait()
        sync(self._folder)

    def load(self, folder: Path) -> None:
        self._kind(str(folder)).restore(self._target)

    def close(self) -> None:
        pass


class TorchCheckpointing:
    """``torch_checkpointing``'s manager: staged to shared memory, written by a process. Its direct I/O is off: it fails
    with EINVAL on ext4, where nothing of it is aligned.
    """

    key: ClassVar[str] = "torch_checkpointing"
    name: ClassVar[str] = "torch_checkpointing + fsync"
    needs: ClassVar[str] = "torch_checkpointing"
    runs_a_loop: ClassVar[bool] = False

    def __init__(self, source: Any, target: Any) -> None:
        from torch_checkpointing.checkpoint_manager import CheckpointManager
        from torch_checkpointing.config import AsyncCheckpointSaverConfig
        from torch_checkpointing.staging import CheckpointStagerConfig
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        staging = CheckpointStagerConfig(
            use_pinned_memory=False, use_shared_memory=True, use_async_staging=False, use_non_blocking_copy=False
        )
        self._source, self._target = source, target
        self._manager: Any = CheckpointManager.Config(
            save=AsyncCheckpointSaverConfig(staging_config=staging),
            storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
        ).build()
        self._future: Any = None
        self._folder = Path()

    def begin(self, folder: Path) -> None:
        self._folder = folder
        self._future = self._manager.save(str(folder), self._source)

    def staged(self) -> None:
        with self._manager.lock():  # its word for: the staged copy is complete, the tensors may be changed
            pass

    def done(self) -> bool:
        return bool(self._future.done())

    def finish(self) -> None:
        self._future.result()
        sync(self._folder)

    def load(self, folder: Path) -> None:
        self._manager.load(str(folder), into=self._target)

    def close(self) -> None:
        self._manager.close()
        for thread in threading.enumerate():
            if thread.name.startswith("torch_checkpointing"):
                thread.join(10)
