"""A Lightning plugin: ``Trainer(plugins=[AsyncDCPCheckpointIO()])`` saves through asyncdcp. Imports Lightning."""

from __future__ import annotations

import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from threading import Lock
from typing import Any

import anyio
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.utilities.data import AttributeDict

from asyncdcp.checkpointer import AsyncCheckpointer, SaveHandle
from asyncdcp.checkpointer.asynchronous import PROCESS_BY_DEFAULT
from asyncdcp.config import Options
from asyncdcp.errors import CheckpointNotFound, InvalidOption
from asyncdcp.futures import CheckpointFuture
from asyncdcp.names import record_save_id
from asyncdcp.ranks import SoleRank
from asyncdcp.storage import open_storage
from asyncdcp.storage.files import sync_directory

_logger = logging.getLogger("asyncdcp")


class AsyncDCPCheckpointIO(CheckpointIO):
    """Lightning's checkpoints as directories of asyncdcp's.

    ``save_checkpoint`` returns once the tensors are copied, so that training may change them; the rest goes on beside
    it. A checkpoint that Lightning removes is deleted once every save that was called before is committed, so that
    there is always a whole one; not if it is saved anew until then. An error of a save is raised by the next verb, or
    at the end of the fit.

    ``allow_pickle=True`` pickles what a module or callback put into its checkpoint that could not be stored
    otherwise, and is needed again to load it. ``options`` and ``process`` are as in ``AsyncCheckpointer``.
    """

    def __init__(
        self, options: Options | None = None, *, process: bool = PROCESS_BY_DEFAULT, allow_pickle: bool = False
    ) -> None:
        self._options = options
        self._process = process
        self._allow_pickle = allow_pickle
        self._opened: AsyncCheckpointer | None = None
        self._last: SaveHandle | None = None
        self._removing = Lock()
        self._doomed: dict[str, CheckpointFuture[Any]] = {}  # what is removed, and the commit that this waits for

    @property
    def _checkpointer(self) -> AsyncCheckpointer:
        """Made where it is first needed: a trainer may fit again after its teardown. Each process works alone: of
        several, Lightning saves on the first one only, what it has gathered there, and loads on all.
        """
        if self._opened is None:
            self._opened = AsyncCheckpointer(self._options, process=self._process, process_group=SoleRank())
        return self._opened

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Saves to the directory ``path``; takes the place of what is there, once it is committed. The folder of
        ``path`` is there at once: ``save_last="link"`` makes a link in it.
        """
        if storage_options is not None:
            raise InvalidOption("storage_options are not taken here; give Options to AsyncDCPCheckpointIO instead")
        if not _is_url(path):
            with suppress(OSError):  # the save comes upon it, too, and says so
                os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        plain = {key: _plain(value) for key, value in checkpoint.items()}
        with self._removing:  # what is being removed now is gone first
            self._doomed.pop(os.fspath(path), None)
        self._last = self._checkpointer.save(path, plain, overwrite=True, allow_pickle=self._allow_pickle)
        self._last.staged.result()

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any | None = None,
        weights_only: bool | None = None,  # noqa: FBT001  # as Lightning has it
    ) -> dict[str, Any]:
        """The whole checkpoint, on ``map_location`` if that is a device, else on the CPU. A ``.ckpt`` file that torch
        wrote is read, too, if it holds tensors and plain values only. Nothing is unpickled without ``allow_pickle``,
        whatever ``weights_only`` says.
        """
        if self._last is not None:
            self._last.result()
        device = map_location if isinstance(map_location, (str, torch.device)) else "cpu"
        load: CheckpointFuture[Any] = self._checkpointer.load(path, device=device, allow_pickle=self._allow_pickle)
        state: dict[str, Any] = load.result()
        return state

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Deletes the checkpoint, as soon as what was saved before this call is committed. It stays if that fails."""
        if not _is_url(path) and not os.path.lexists(path) and self._last is None:
            raise CheckpointNotFound(f"there is no {os.fspath(path)}", path=os.fspath(path))
        if self._last is None:
            _delete(path)
            return
        with self._removing:
            self._doomed[os.fspath(path)] = self._last.committed
        self._last.committed.add_done_callback(partial(self._remove, os.fspath(path)))

    def _remove(self, path: str, saved: CheckpointFuture[Any]) -> None:
        with self._removing:
            if self._doomed.get(path) is not saved:
                return
            del self._doomed[path]
            if saved.failed:
                _logger.warning("%s is kept", path)
            else:
                _delete(path)

    def teardown(self) -> None:
        """Waits until all is committed; raises if a save failed that nobody has looked at."""
        opened, self._opened, self._last = self._opened, None, None
        if opened is not None:
            opened.close()


def _is_url(path: str | os.PathLike[str]) -> bool:
    return "://" in os.fspath(path)


def _delete(path: str | os.PathLike[str]) -> None:
    if _is_url(path):
        with ThreadPoolExecutor(1) as thread:  # the caller's may run a loop, as a notebook's does
            thread.submit(anyio.run, _empty, os.fspath(path)).result()
    elif os.path.isdir(path) and not os.path.islink(path):
        for name in os.listdir(path):
            if record_save_id(name) is not None:  # first, so that what a crash leaves is no checkpoint
                os.unlink(os.path.join(path, name))
        sync_directory(path)
        shutil.rmtree(path)
    else:
        os.unlink(path)


async def _empty(url: str) -> None:
    storage = open_storage(url)
    names = list(await storage.list())
    if not names:
        raise CheckpointNotFound(f"there is no {url}", path=url)
    records = [name for name in names if record_save_id(name) is not None]
    await storage.delete(records)  # first, so that what a crash leaves is no checkpoint
    await storage.delete([name for name in names if name not in records])


def _plain(value: Any) -> Any:
    """``AttributeDict``, as which Lightning keeps hyperparameters, as a dict."""
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, AttributeDict) else value
