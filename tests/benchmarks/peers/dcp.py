"""torch's own: ``torch.distributed.checkpoint`` in its ways to save, and what it has in the making."""

from __future__ import annotations

import logging
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save, save

from tests.benchmarks.peers.peer import sync


class _DCP:
    needs: ClassVar[str] = "torch"
    runs_a_loop: ClassVar[bool] = False

    def __init__(self, source: Any, target: Any) -> None:
        warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint")
        logging.getLogger("torch.distributed").setLevel(logging.ERROR)
        self._source, self._target = source, target

    def load(self, folder: Path) -> None:
        load(self._target, checkpoint_id=folder, no_dist=True)

    def close(self) -> None:
        pass


class DCPSave(_DCP):
    """``dcp.save``: blocks, and syncs its files."""

    key: ClassVar[str] = "dcp"
    name: ClassVar[str] = "dcp.save"

    def begin(self, folder: Path) -> None:
        save(self._source, checkpoint_id=folder, no_dist=True)

    def staged(self) -> None:
        pass

    def done(self) -> bool:
        return True

    def finish(self) -> None:
        pass


class _DCPAsync(_DCP):
    """``dcp.async_save`` with a stager that is kept; on a CPU it stages before it returns."""

    kind: ClassVar[AsyncCheckpointerType]
    shared: ClassVar[bool]

    def __init__(self, source: Any, target: Any) -> None:
        super().__init__(source, target)
        options = StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=self.shared,
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
        self._stager = DefaultStager(options)
        self._future: Future[Any] | None = None

    def begin(self, folder: Path) -> None:
        future = async_save(
            self._source,
            checkpoint_id=folder,
            async_stager=self._stager,
            async_checkpointer_type=self.kind,
            no_dist=not dist.is_initialized(),
        )
        assert isinstance(future, Future)
        self._future = future

    def staged(self) -> None:
        pass

    def done(self) -> bool:
        return self._future is not None and self._future.done()

    def finish(self) -> None:
        assert self._future is not None
        self._future.result()

    def close(self) -> None:
        self._stager.close()


class DCPAsyncThread(_DCPAsync):
    """The rest on a thread."""

    key: ClassVar[str] = "dcp-thread"
    name: ClassVar[str] = "dcp.async_save, thread"
    kind = AsyncCheckpointerType.THREAD
    shared = False


class DCPAsyncProcess(_DCPAsync):
    """The rest in a process, over memory shared with it. It needs a process group, be it of one."""

    key: ClassVar[str] = "dcp-process"
    name: ClassVar[str] = "dcp.async_save, process"
    kind = AsyncCheckpointerType.PROCESS
    shared = True

    def __init__(self, source: Any, target: Any) -> None:
        super().__init__(source, target)
        self._owns_group = not dist.is_initialized()
        if self._owns_group:
            dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)

    def close(self) -> None:
        super().close()
        if self._owns_group:
            dist.destroy_process_group()


class Experimental:
    """``torch.distributed.checkpoint._experimental``: a process over shared memory, kept. It syncs nothing."""

    key: ClassVar[str] = "experimental"
    name: ClassVar[str] = "dcp._experimental + fsync"
    needs: ClassVar[str] = "torch.distributed.checkpoint._experimental"
    runs_a_loop: ClassVar[bool] = False

    def __init__(self, source: Any, target: Any) -> None:
        from torch.distributed.checkpoint._experimental import builder, config, staging

        staging_config = staging.CheckpointStagerConfig(
            use_pinned_memory=False, use_shared_memory=True, use_async_staging=False, use_non_blocking_copy=False
        )
        self._source, self._target = source, target
        self._checkpointer = builder.make_async_checkpointer(config.CheckpointerConfig(staging_config=staging_config))
        self._futures: Any = None
        self._folder = Path()

    def begin(self, folder: Path) -> None:
        self._folder = folder
        self._futures = self._checkpointer.save(str(folder), self._source)

    def staged(self) -> None:
        self._futures[0].result()

    def done(self) -> bool:
        return bool(self._futures[1].done())

    def finish(self) -> None:
        self._futures[1].result()
        sync(self._folder)

    def load(self, folder: Path) -> None:
        self._checkpointer.load(str(folder), self._target)

    def close(self) -> None:
        self._checkpointer.close()
