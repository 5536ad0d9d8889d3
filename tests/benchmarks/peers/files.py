"""One call that writes one file, and keeps its caller until it is durable."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import safetensors
import safetensors.torch
import torch

from tests.benchmarks.peers.peer import sync
from tests.benchmarks.states import tensors_of


class _Blocking:
    needs: ClassVar[str] = "torch"
    runs_a_loop: ClassVar[bool] = False

    def __init__(self, source: Any, target: Any) -> None:
        self._source = source
        self._sources, self._targets = tensors_of(source), tensors_of(target)

    def staged(self) -> None:
        pass

    def done(self) -> bool:
        return True

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


class TorchSave(_Blocking):
    """``torch.save`` and ``torch.load``, mapped, so that every byte is copied once, into the target."""

    key: ClassVar[str] = "torch"
    name: ClassVar[str] = "torch.save + fsync"

    def begin(self, folder: Path) -> None:
        folder.mkdir()
        with open(folder / "state.pt", "wb") as file:
            torch.save(self._source, file)
            file.flush()
            os.fsync(file.fileno())
        sync(folder)

    def load(self, folder: Path) -> None:
        loaded = tensors_of(torch.load(folder / "state.pt", mmap=True, weights_only=True))
        for name, target in self._targets.items():
            target.copy_(loaded[name])


class SafeTensors(_Blocking):
    """The safetensors library; it stores tensors only, and maps the file to load."""

    key: ClassVar[str] = "safetensors"
    name: ClassVar[str] = "safetensors + fsync"
    needs: ClassVar[str] = "safetensors"

    def begin(self, folder: Path) -> None:
        folder.mkdir()
        safetensors.torch.save_file(self._sources, folder / "state.safetensors")
        sync(folder)

    def load(self, folder: Path) -> None:
        with safetensors.safe_open(folder / "state.safetensors", framework="pt") as file:
            for name, target in self._targets.items():
                target.copy_(file.get_tensor(name))
