"""One load on the engine's loop: open, match, read, put together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import zstandard
from anyio import to_thread

from asyncdcp.errors import CheckpointNotFound, CorruptCheckpoint
from asyncdcp.extensions import ExtensionRegistry
from asyncdcp.futures import CheckpointFuture
from asyncdcp.metadata import Metadata, TensorStorageMetadata
from asyncdcp.pipeline.descriptions import Description, Viewer, describe
from asyncdcp.pipeline.formats import ReadableCheckpoint, open_checkpoint
from asyncdcp.pipeline.load import load
from asyncdcp.pipeline.reader import CheckpointReader
from asyncdcp.pipeline.union import check_sizes
from asyncdcp.planning import Want, plan_load
from asyncdcp.ranks import Ranks, together
from asyncdcp.results import LoadReport, frozen
from asyncdcp.state_dict.flatten import FlatState
from asyncdcp.state_dict.matching import match, unexpected_everywhere
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
    ranks: Ranks
    deadline: float
    registry: ExtensionRegistry | None = None

    @property
    def location(self) -> str:
        return self.storage.info.location


async def load_state(request: LoadRequest) -> tuple[Any, LoadReport]:
    """Everything is matched before a byte of data is read, and every byte is verified before ``load_state_dict`` is
    called.
    """
    if request.after is not None:
        await request.after
    begun = time.monotonic()
    async with aclosing(await open_shared(request)) as reader:
        into: _InPlace | _Anew = (
            _Anew(request, reader.metadata) if request.flat is None else _InPlace(request, reader.metadata)
        )
        wants, targets = await bind_together(request, into)
        plan = await to_thread.run_sync(plan_load, reader.metadata, wants)
        request.trace.total = plan.read_bytes

        async def read() -> bytes:
            await load(reader, plan, targets, request.trace)
            return b""

        await together(request.ranks, f"the reading of {request.location}", read, deadline=request.deadline)
        with request.trace.span("restore"):
            state = await to_thread.run_sync(into.finish)
    report = LoadReport(
        path=request.location,
        save_id=reader.metadata.storage_meta.save_id,
        tensors=len(wants),
        read_bytes=plan.read_bytes,
        seconds=time.monotonic() - begun,
        stage_seconds=frozen(request.trace.seconds()),
    )
    return state, report


async def open_shared(request: LoadRequest) -> ReadableCheckpoint:
    """The checkpoint, which is the same on all ranks: rank 0 finds it and reads what describes it, the others hear that
    from it. A checkpoint of another format is opened by each rank.
    """
    ranks, storage = request.ranks, request.storage
    viewer = Viewer(ranks.rank, ranks.world_size, request.options.per_rank)
    if ranks.world_size == 1:
        return await open_checkpoint(storage, viewer, request.registry)
    found: list[CheckpointReader] = []

    async def find() -> bytes:
        if ranks.rank:
            return b""
        try:
            description = await describe(storage, request.registry)
        except CheckpointNotFound:
            await (
                await open_checkpoint(storage, viewer, request.registry)
            ).aclose()  # of another format, or there is none
            return b""
        found.append(await CheckpointReader.of(storage, description, viewer, request.registry))
        check_sizes(found[0].files, await storage.list())
        return await to_thread.run_sync(_packed, description)

    packed = await together(ranks, f"the opening of {request.location}", find, deadline=request.deadline)
    if not packed:
        return await open_checkpoint(storage, viewer, request.registry)
    if found:
        return found[0]
    return await CheckpointReader.of(storage, await to_thread.run_sync(_unpacked, packed), viewer, request.registry)


async def bind_together(request: LoadRequest, into: _InPlace | _Anew) -> tuple[list[Want], list[TensorTarget]]:
    """Wants and targets of this rank. What is in the checkpoint and not in its state may be another rank's: it is
    unexpected if it is so on all of them. Whatever is wrong on one rank, no rank reads anything.
    """
    bound: list[tuple[list[Want], list[TensorTarget]]] = []

    async def bind() -> bytes:
        bound.append(await to_thread.run_sync(into.bind))
        return msgspec.msgpack.encode(into.unexpected)

    await together(request.ranks, f"what is loaded from {request.location}", bind, partial(_all_expected, request))
    return bound[0]


def _all_expected(request: LoadRequest, told: Sequence[bytes]) -> bytes:
    left: list[list[str]] = [msgspec.msgpack.decode(names, type=list[str]) for names in told]
    nobodys = set(left[0]).intersection(*left[1:])
    if nobodys and request.options.strict:
        raise unexpected_everywhere(request.location, [name for name in left[0] if name in nobodys])
    return b""


def _packed(description: Description) -> bytes:
    return zstandard.compress(msgspec.msgpack.encode(description), 1)


def _unpacked(packed: bytes) -> Description:
    return msgspec.msgpack.decode(zstandard.decompress(packed), type=Description)


class _Anew:
    """A load that makes a new state of CPU tensors, or on ``options.device``; with ``options.keys``, a part of one."""

    def __init__(self, request: LoadRequest, metadata: Metadata) -> None:
        self._options = request.options
        self._metadata = metadata
        self._state: Any = None
        self.unexpected: list[str] = []

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
        self._alone = request.ranks.world_size == 1
        self.unexpected: list[str] = []

    def bind(self) -> tuple[list[Want], list[TensorTarget]]:
        """Matches state and checkpoint; ``StateMismatch`` otherwise. Makes the tensors that have no target."""
        metadata, options = self._metadata, self._options
        tree, values = decoded(metadata)
        nodes = TreeNodes(tree, options.renamed)
        found = match(self._flat, metadata, nodes, options, alone=self._alone)
        self.unexpected = found.unexpected
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
