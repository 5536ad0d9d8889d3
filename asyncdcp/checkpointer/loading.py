"""One load on the engine's loop: open, match, read, put together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import anyio
import msgspec
import torch
from anyio import to_thread
from torch import Tensor

from asyncdcp.engine import Engine
from asyncdcp.errors import AsyncDCPError, Cancelled, CorruptCheckpoint, DeadlineExceeded, UnsupportedFormat
from asyncdcp.futures import CheckpointFuture
from asyncdcp.metadata import Metadata, TensorStorageMetadata
from asyncdcp.pipeline.load import load
from asyncdcp.pipeline.reader import CheckpointReader
from asyncdcp.planning import Want, plan_load
from asyncdcp.results import LoadReport, frozen
from asyncdcp.state_dict.flatten import FlatState
from asyncdcp.state_dict.matching import match
from asyncdcp.state_dict.structure import DTYPES
from asyncdcp.state_dict.targets import TensorTarget, new_tensors, targets_of
from asyncdcp.state_dict.unflatten import unflatten, unflatten_into
from asyncdcp.storage import Storage
from asyncdcp.trace import Trace


@dataclass(frozen=True)
class LoadRequest:
    """A load as the caller's thread hands it over: into ``state`` (flattened as ``flat``), or a new state if ``flat``
    is None.
    """

    storage: Storage
    state: Any
    flat: FlatState | None
    strict: bool
    device: torch.device
    trace: Trace


class LoadTask:
    """Carries one load out on the engine's loop, and resolves ``future``."""

    def __init__(self, request: LoadRequest, engine: Engine, deadline: float) -> None:
        self._request = request
        self._deadline = deadline
        self._path = request.storage.info.location
        self._scope = anyio.CancelScope()
        self.future: CheckpointFuture[Any] = engine.future(f"load of {self._path}", cancel=self._cancel)

    async def run(self) -> None:
        """Never raises but for cancellation, at the engine's end."""
        timer = asyncio.get_running_loop().call_later(self._deadline, self._expire)
        try:
            with self._scope:
                state, report = await _load(self._request)
                self.future.report = report
                self.future.resolve(state)
        except AsyncDCPError as error:
            self.future.fail(error)
        except Exception as error:  # noqa: BLE001  # it belongs to whoever awaits the load
            known = AsyncDCPError(f"the load of {self._path} failed: {type(error).__name__}: {error}", path=self._path)
            known.__cause__ = error
            self.future.fail(known)
        finally:
            timer.cancel()
            self.future.fail(Cancelled(f"the load of {self._path} was cancelled", path=self._path))

    def _cancel(self) -> None:
        self._scope.cancel()

    def _expire(self) -> None:
        """A read that never returns must not keep the caller: the future fails now, the read is left to end when it
        can.
        """
        self.future.fail(
            DeadlineExceeded(
                f"the load of {self._path} was not done within {self._deadline:g} s (option load_deadline); tensors "
                "loaded in place may still be written to",
                path=self._path,
            )
        )
        self._scope.cancel()


async def _load(request: LoadRequest) -> tuple[Any, LoadReport]:
    """Structure, names, shapes and dtypes are checked, and plain values of a new state decoded, before a byte of data
    is read.
    """
    begun = time.monotonic()
    async with await CheckpointReader.open(request.storage) as reader:
        metadata = reader.metadata
        tree, values = _decoded(metadata)
        tensors, wants, targets = await to_thread.run_sync(_bind, request, metadata)
        plan = await to_thread.run_sync(plan_load, metadata, wants)
        request.trace.total = plan.read_bytes
        rebuild = _builder(request, tree, tensors, metadata.aliases, values)
        state = rebuild() if request.flat is None else None
        await load(reader, plan, targets, request.trace)
        if request.flat is not None:
            state = rebuild()
    report = LoadReport(
        path=request.storage.info.location,
        save_id=reader.record.save_id,
        tensors=len(tensors),
        read_bytes=plan.read_bytes,
        seconds=time.monotonic() - begun,
        stage_seconds=frozen(request.trace.seconds()),
    )
    return state, report


def _decoded(metadata: Metadata) -> tuple[Any, dict[str, Any]]:
    try:
        tree = msgspec.json.decode(metadata.tree)
        values = {name: msgspec.json.decode(value) for name, value in metadata.values.items()}
    except (msgspec.MsgspecError, RecursionError) as error:
        raise CorruptCheckpoint(
            f"{metadata.storage_meta.checkpoint_id}: its tree or values are not JSON ({error})"
        ) from error
    return tree, values


def _bind(request: LoadRequest, metadata: Metadata) -> tuple[dict[str, Tensor], list[Want], list[TensorTarget]]:
    """The tensors to fill, by their names in the checkpoint, and the wants and targets that fill them."""
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata) and entry.properties.dtype not in DTYPES:
            raise UnsupportedFormat(
                f"{name} has dtype {entry.properties.dtype}, which this torch does not have", tensors=[name]
            )
    if request.flat is not None:
        found = match(request.flat, metadata, strict=request.strict)
        pairs = [(name, tensor) for name, targets in found.items() for tensor in targets]
        return {name: targets[0] for name, targets in found.items()}, *targets_of(pairs)
    names = [n for n, entry in metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)]
    made = new_tensors(metadata, names, request.device)
    return made, *targets_of(list(made.items()))


def _builder(
    request: LoadRequest, tree: Any, tensors: dict[str, Tensor], aliases: dict[str, str], values: dict[str, Any]
) -> Callable[[], Any]:
    """What puts the state together from tensors and values."""
    tensors = {**tensors, **{alias: tensors[name] for alias, name in aliases.items() if name in tensors}}
    if request.flat is None:
        return lambda: unflatten(tree, tensors, values)
    return lambda: unflatten_into(request.state, tree, tensors, values, strict=request.strict).state
