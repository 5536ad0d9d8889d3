"""One load on the engine's loop: open, match, read, put together."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from functools import partial
from secrets import token_hex
from typing import Any, NamedTuple, TypeAlias, TypeVar

import msgspec
import zstandard
from anyio import to_thread

from asyncdcp.checkpointer.sharing import Exchange, what_to_share
from asyncdcp.errors import AsyncDCPError, CheckpointNotFound, CorruptCheckpoint, InvalidOption, PeerError
from asyncdcp.extensions import ExtensionRegistry
from asyncdcp.futures import CheckpointFuture
from asyncdcp.metadata import Metadata, TensorStorageMetadata
from asyncdcp.pipeline.descriptions import Description, Viewer, describe
from asyncdcp.pipeline.formats import ReadableCheckpoint, open_checkpoint
from asyncdcp.pipeline.load import load
from asyncdcp.pipeline.reader import CheckpointReader
from asyncdcp.pipeline.union import check_sizes
from asyncdcp.planning import LoadPlan, Want, plan_load
from asyncdcp.planning.shared_reads import SharedReads, Wanted, share_reads
from asyncdcp.ranks import Links, Ranks, together
from asyncdcp.results import LoadReport, PerRankOutcome, frozen
from asyncdcp.state_dict.flatten import FlatState
from asyncdcp.state_dict.matching import match
from asyncdcp.state_dict.mismatches import nothing_chosen, unexpected_everywhere
from asyncdcp.state_dict.nodes import TreeNodes
from asyncdcp.state_dict.options import LoadOptions
from asyncdcp.state_dict.pruning import choose, leaves
from asyncdcp.state_dict.restoring import Restorer
from asyncdcp.state_dict.targets import TensorTarget, new_tensors, targets_of
from asyncdcp.state_dict.unflatten import unflatten
from asyncdcp.storage import Storage
from asyncdcp.trace import Trace

T = TypeVar("T")

Opening: TypeAlias = Callable[[], Awaitable[ReadableCheckpoint]]


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
    called. Until then all that may fail on a rank is done within an agreement, so it fails the others, too.
    """
    async with AsyncExitStack() as opened:
        begun, open_here = await find_together(request, opened)
        bound = await bind_together(request, open_here)
        opened.callback(bound.drop)
        exchange = await _read_together(request, bound, until=begun + request.deadline)
        with request.trace.span("restore"):
            state = await to_thread.run_sync(bound.into.finish)
    metadata = bound.reader.metadata
    report = LoadReport(
        path=request.location,
        save_id=metadata.storage_meta.save_id,
        tensors=len(bound.plan.wants),
        read_bytes=exchange.read_bytes + exchange.rest.read_bytes,
        seconds=time.monotonic() - begun,
        stage_seconds=frozen(request.trace.seconds()),
        received_bytes=exchange.received_bytes,
        per_rank=_per_rank(request, metadata, bound.into),
        missing=tuple(bound.into.missing),
        unexpected=tuple(bound.into.unexpected),
    )
    return state, report


def _per_rank(request: LoadRequest, metadata: Metadata, into: _InPlace | _Anew) -> dict[str, PerRankOutcome]:
    """What became of what each rank has for itself."""
    outcome: PerRankOutcome = "own"
    if metadata.storage_meta.world_size != request.ranks.world_size:
        outcome = "rank0" if request.options.per_rank == "rank0" else "dropped"
    if outcome == "dropped":
        return dict.fromkeys(filter(request.options.selects, sorted(metadata.own)), outcome)
    return dict.fromkeys(sorted(metadata.own & into.loaded), outcome)


async def _read_together(request: LoadRequest, bound: Bound, *, until: float) -> Exchange:
    """What ranks read for each other first, then what each reads for itself; done when all have all."""
    ranks, location = request.ranks, request.location
    exchanges: list[Exchange] = []
    links: list[Links] = []  # kept until nobody needs them: a connection that ends takes along what was not read yet
    meeting = ""

    async def prepare() -> bytes:
        shared = await to_thread.run_sync(_expanded, bound.shared, SharedReads) if bound.shared else SharedReads()
        found = await to_thread.run_sync(Exchange, shared, ranks.rank, bound.plan, bound.targets)
        exchanges.append(found)
        request.trace.total = found.read_bytes + found.received_bytes + found.rest.read_bytes
        return token_hex(8).encode()

    async def read() -> bytes:
        if meeting:
            links.append(await ranks.connect(meeting, until=until))
            await exchanges[0].run(bound.reader, links[0], request.trace)
        else:
            await prepare()
        await load(bound.reader, exchanges[0].rest, bound.targets, request.trace)
        return b""

    try:
        if bound.shared:  # rank 0's name is where all meet, whatever has become of earlier loads on each
            meeting = (await together(ranks, f"who reads what of {location}", prepare)).decode()
        await together(ranks, f"the reading of {location}", read, deadline=request.deadline)
    finally:
        for each in links:
            await each.aclose()
    return exchanges[0]


async def find_together(request: LoadRequest, opened: AsyncExitStack) -> tuple[float, Opening]:
    """When the load has begun, and how to open the checkpoint, which is the same on all ranks: rank 0 finds it and
    reads what describes it, the others hear that from it. A checkpoint of another format is opened by each rank.
    """
    ranks, storage = request.ranks, request.storage
    viewer = Viewer(ranks.rank, ranks.world_size, request.options.per_rank)
    found: list[CheckpointReader] = []
    begun: list[float] = []

    async def find() -> bytes:
        if request.after is not None:
            await request.after
        begun.append(time.monotonic())
        if ranks.rank or ranks.world_size == 1:
            return b""
        try:
            description = await describe(storage, request.registry)
        except CheckpointNotFound:
            other = await open_checkpoint(storage, viewer, request.registry)  # raises where there is none at all
            await other.aclose()
            return b""
        found.append(await CheckpointReader.of(storage, description, viewer, request.registry))
        opened.push_async_callback(found[0].aclose)
        check_sizes(found[0].files, await storage.list())
        return await to_thread.run_sync(_compressed, description)

    packed = await together(ranks, _opening(request.location), find, deadline=request.deadline)

    async def open_here() -> ReadableCheckpoint:
        if found:
            return found[0]
        if packed:
            description = await to_thread.run_sync(_expanded, packed, Description)
            reader: ReadableCheckpoint = await CheckpointReader.of(storage, description, viewer, request.registry)
        else:
            reader = await open_checkpoint(storage, viewer, request.registry)
        opened.push_async_callback(reader.aclose)
        return reader

    return begun[0], open_here


async def refuse_load(ranks: Ranks, location: str, error: AsyncDCPError) -> None:
    """Says to the other ranks that this one does not come to the load from ``location``. Never raises."""
    with suppress(PeerError):
        await ranks.refuse(_opening(location), error)


def _opening(location: str) -> str:
    return f"the opening of {location}"


class Bound(NamedTuple):
    """What this rank wants of the checkpoint; and, still packed, what of it the ranks read for each other, if
    anything.
    """

    reader: ReadableCheckpoint
    into: _InPlace | _Anew
    plan: LoadPlan
    targets: list[TensorTarget]
    shared: bytes

    def drop(self) -> None:
        """Lets go of the tensors: nothing is read any more, and whoever has a load's error has this."""
        self.targets.clear()
        self.into.drop()


class _Told(msgspec.Struct):
    """What a rank has to say of its state and the checkpoint. ``wanted`` is None where it reads for itself alone."""

    unexpected: list[str]
    wanted: Wanted | None


async def bind_together(request: LoadRequest, open_here: Opening) -> Bound:
    """Opens the checkpoint and matches it with the state, on every rank. What is in the checkpoint and not in its state
    may be another rank's: it is unexpected if it is so on all of them. Whatever is wrong on one rank, no rank reads
    anything.
    """
    made: list[Bound] = []

    def bind(reader: ReadableCheckpoint) -> bytes:
        metadata = reader.metadata
        into = _Anew(request, metadata) if request.flat is None else _InPlace(request, metadata)
        wants, targets = into.bind()
        made.append(Bound(reader, into, plan_load(metadata, wants), targets, b""))
        shares = request.options.replicas == "broadcast" and request.ranks.world_size > 1
        unexpected = into.unexpected if request.options.strict else []
        return _compressed(_Told(unexpected, what_to_share(made[0].plan, metadata) if shares else None))

    async def work() -> bytes:
        return await to_thread.run_sync(bind, await open_here())

    shared = await together(request.ranks, f"what is loaded from {request.location}", work, partial(_judged, request))
    return made[0]._replace(shared=shared)


def _judged(request: LoadRequest, told: Sequence[bytes]) -> bytes:
    """Whether all that is in the checkpoint has its place, and who reads what for others, if anybody; on rank 0."""
    each = [_expanded(one, _Told) for one in told]
    nobodys = set(each[0].unexpected).intersection(*(one.unexpected for one in each[1:]))
    if nobodys and request.options.strict:
        names = [name for name in each[0].unexpected if name in nobodys]
        raise unexpected_everywhere(request.location, names)
    asked = [one.wanted for one in each if one.wanted is not None]
    if asked and len(asked) < len(each):
        other = next(rank for rank, one in enumerate(each) if (one.wanted is None) != (each[0].wanted is None))
        raise InvalidOption(f"rank 0 and rank {other} load with different replicas=: all ranks must give the same")
    shared = share_reads(asked) if asked else SharedReads()
    return _compressed(shared) if shared.units else b""


def _compressed(value: msgspec.Struct) -> bytes:
    return zstandard.compress(msgspec.msgpack.encode(value), 1)


def _expanded(data: bytes, kind: type[T]) -> T:
    return msgspec.msgpack.decode(zstandard.decompress(data), type=kind)


class _Anew:
    """A load that makes a new state of CPU tensors, or on ``options.device``; with ``options.keys``, a part of one."""

    def __init__(self, request: LoadRequest, metadata: Metadata) -> None:
        self._options = request.options
        self._path = request.location
        self._metadata = metadata
        self._state: Any = None
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.loaded: frozenset[str] = frozenset()

    def bind(self) -> tuple[list[Want], list[TensorTarget]]:
        """Makes the state, its tensors still without content: a damaged tree is found before anything is read."""
        metadata, options = self._metadata, self._options
        tree, values = decoded(metadata)
        if options.keys is not None:
            tree, idle = choose(tree, options.keys, metadata.own)
            if tree is None or (idle and options.strict):
                raise nothing_chosen(self._path, idle)
        names = leaves(tree) if options.keys is not None else None
        self.loaded = frozenset(metadata.own if names is None else names)
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

    def drop(self) -> None:
        self._state = None


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
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.loaded: frozenset[str] = frozenset()

    def bind(self) -> tuple[list[Want], list[TensorTarget]]:
        """Matches state and checkpoint; ``StateMismatch`` otherwise. Makes the tensors that have no target."""
        metadata, options = self._metadata, self._options
        tree, values = decoded(metadata)
        nodes = TreeNodes(tree, options.renamed, allow_pickle=options.allow_pickle)
        found = match(self._flat, metadata, nodes, options, alone=self._alone)
        self.missing, self.unexpected, self.loaded = found.missing, found.unexpected, found.loaded
        made = new_tensors(metadata, found.fresh, found.alike)
        found.add_fresh(made)
        self._restorer = Restorer(self._flat, found, nodes, values, options)
        return targets_of(metadata, [*found.fill, *made.items()])

    def finish(self) -> Any:
        """Plain values, and every Stateful's ``load_state_dict``, in the state's order."""
        assert self._restorer is not None
        return self._restorer.restore(self._state)

    def drop(self) -> None:
        self._restorer = None


def decoded(metadata: Metadata) -> tuple[Any, dict[str, Any]]:
    """The checkpoint's tree and values, as JSON says them; not trusted yet."""
    try:
        tree = msgspec.json.decode(metadata.tree)
        values = {name: msgspec.json.decode(value) for name, value in metadata.values.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        path = metadata.storage_meta.checkpoint_id
        raise CorruptCheckpoint(f"{path}: its tree or values are not JSON ({error})", path=path) from error
    return tree, values
