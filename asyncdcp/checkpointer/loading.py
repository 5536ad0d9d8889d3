"""One load on the engine's loop: open, match, read, put together."""

from __future__ import annotations

import time
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec
from anyio import to_thread

from asyncdcp.errors import CorruptCheckpoint
from asyncdcp.extensions import ExtensionRegistry
from asyncdcp.futures import CheckpointFuture
from asyncdcp.metadata import Metadata, TensorStorageMetadata
from asyncdcp.pipeline.formats import open_checkpoint
from asyncdcp.pipeline.load import load
from asyncdcp.planning import Want, plan_load
from asyncdcp.results import LoadReport, frozen
from asyncdcp.state_dict.flatten import FlatState
from asyncdcp.state_dict.matching import match
from asyncdcp.state_dict.nodes import TreeNodes
from asyncdcp.state_dict.options import LoadOptions
from asyncdcp.state_dict.pruning import leaves, prune
from asyncdcp.state_dict.restoring import Restorer
from asyncdcp.state_dict.targets import TensorTarget, new_tensors, targets_of
from asyncdcp.state_dict.unflatten import unflatten
from asyncdcp.storage import Storage
from asyncdcp.trace import Trace


@dataclass(frozen=True)
class LoadRequest:
    """A load as the caller's thread hands it over: into ``state`` (flattened as ``flat``), or a new state if ``flat``
    is None. It begins once ``after`` is done: until then saves may read the tensors that it will write to.
    """

    storage: Storage
    state: Any
    flat: FlatState | None
    options: LoadOptions
    trace: Trace
    after: CheckpointFuture[None] | None
    registry: ExtensionRegistry | None = None


async def load_state(request: LoadRequest) -> tuple[Any, LoadReport]:
    """Everything is matched before a byte of data is read, and every byte is verified before ``load_state_dict`` is
    called.
    """
    if request.after is not None:
        await request.after
    begun = time.monotonic()
    async with aclosing(await open_checkpoint(request.storage, request.registry)) as reader:
        into: _InPlace | _Anew = (
            _Anew(request, reader.metadata) if request.flat is None else _InPlace(request, reader.metadata)
        )
        wants, targets = await to_thread.run_sync(into.bind)
        plan = await to_thread.run_sync(plan_load, reader.metadata, wants)
        request.trace.total = plan.read_bytes
        await load(reader, plan, targets, request.trace)
        with request.trace.span("restore"):
            state = await to_thread.run_sync(into.finish)
    report = LoadReport(
        path=request.storage.info.location,
        save_id=reader.metadata.storage_meta.save_id,
        tensors=len(wants),
        read_bytes=plan.read_bytes,
        seconds=time.monotonic() - begun,
        stage_seconds=frozen(request.trace.seconds()),
    )
    return state, report


class _Anew:
    """A load that makes a new state of CPU tensors, or on ``options.device``; with ``options.keys``, a part of one."""

    def __init__(self, request: LoadRequest, metadata: Metadata) -> None:
        self._options = request.options
        self._metadata = metadata
        self._state: Any = None

    def bind(self) -> tuple[list[Want], list[TensorTarget]]:
        """Makes the state, its tensors still without content: a damaged tree is found before anything is read."""
        metadata, options = self._metadata, self._options
        tree, values = decoded(metadata)
        if options.keys is not None:
            tree = prune(tree, options.selects) or {"dict": [[], []]}
        names = leaves(tree) if options.keys is not None else None
        stored = {
            metadata.aliases.get(name, name)
            for name in (*metadata.state_dict_metadata, *metadata.aliases)
            if names is None or name in names
        }
        devices = {
            name: options.device
            for name, entry in metadata.state_dict_metadata.items()
            if name in stored and isinstance(entry, TensorStorageMetadata)
        }
        tensors = new_tensors(metadata, devices)
        ties = {alias: tensors[name] for alias, name in metadata.aliases.items() if name in tensors}
        self._state = unflatten(tree, {**tensors, **ties}, values, allow_pickle=options.allow_pickle)
        return targets_of(metadata, tensors.items())

    def finish(self) -> Any:
        """The state."""
        return self._state


class _InPlace:
    """A load into a state that is there."""

    def __init__(self, request: LoadRequest, metadata: Metadata) -> None:
        assert request.flat is not None
        self._state = request.state
        self._flat = request.flat
        self._options = request.options
        self._metadata = metadata
        self._restorer: Restorer | None = None

    def bind(self) -> tuple[list[Want], list[TensorTarget]]:
        """Matches state and checkpoint; ``StateMismatch`` otherwise. Makes the tensors that have no target."""
        metadata, options = self._metadata, self._options
        tree, values = decoded(metadata)
        nodes = TreeNodes(tree, options.renamed)
        found = match(self._flat, metadata, nodes, options)
        made = new_tensors(metadata, found.fresh, found.alike)
        found.add_fresh(made)
        self._restorer = Restorer(self._flat, found, nodes, values, options)
        return targets_of(metadata, [*found.fill, *made.items()])

    def finish(self) -> Any:
        """Plain values, and every Stateful's ``load_state_dict``, in the state's order."""
        assert self._restorer is not None
        return self._restorer.restore(self._state)


def decoded(metadata: Metadata) -> tuple[Any, dict[str, Any]]:
    """The checkpoint's tree and values, as JSON says them; not trusted yet."""
    try:
        tree = msgspec.json.decode(metadata.tree)
        values = {name: msgspec.json.decode(value) for name, value in metadata.values.items()}
    except (msgspec.MsgspecError, RecursionError) as error:
        path = metadata.storage_meta.checkpoint_id
        raise CorruptCheckpoint(f"{path}: its tree or values are not JSON ({error})", path=path) from error
    return tree, values
