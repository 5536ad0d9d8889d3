"""SavePlanner: what this rank writes in each save of a checkpointer, by itself or as the ranks have agreed."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any, NamedTuple

from anyio import CancelScope, move_on_after, to_thread
from msgspec import structs

from asyncdcp.checkpointer.agreements import SaveAgreements
from asyncdcp.checkpointer.jobs import make_job, versions
from asyncdcp.checkpointer.read_verbs import OnProgress
from asyncdcp.checkpointer.saving import Planned
from asyncdcp.config import Options
from asyncdcp.envelope import encode_record
from asyncdcp.errors import AsyncDCPError
from asyncdcp.extensions import Chain
from asyncdcp.metadata import RunStamp
from asyncdcp.names import make_save_id, record_name
from asyncdcp.pipeline.records import abort_record
from asyncdcp.planning import PlanCache, SavePlan, Structure
from asyncdcp.planning.division import Pick
from asyncdcp.planning.held_chunks import Holdings
from asyncdcp.ranks import Ranks
from asyncdcp.state_dict.flatten import FlatState
from asyncdcp.state_dict.parameters import holdings
from asyncdcp.state_dict.structure import Described, StructureCache
from asyncdcp.storage import Storage
from asyncdcp.trace import Trace
from asyncdcp.unwinding import cancelled_by_others

_logger = logging.getLogger("asyncdcp")


@dataclass(frozen=True)
class SaveName:
    """A call of ``save``: the same on all ranks, which make the same calls. ``number`` counts them all."""

    save_id: str
    number: int


class SaveWords(NamedTuple):
    """The options of a save, as ``AsyncCheckpointer.save`` has them, not checked yet."""

    overwrite: bool = False
    metadata: Mapping[str, Any] | None = None
    keys: Sequence[str] | None = None
    allow_pickle: bool = False
    on_progress: OnProgress | None = None


@dataclass(frozen=True)
class SaveOrder:
    """A save as the caller has asked for it."""

    name: SaveName
    storage: Storage
    overwrite: bool
    metadata: dict[str, Any]
    keys: Sequence[str] | None
    run: RunStamp | None


class SavePlanner:
    """Of one checkpointer. From any thread, but for the coroutines, which are for the engine's loop."""

    def __init__(self, ranks: Ranks, options: Options, chain: Chain) -> None:
        self.run_id = ""
        self.agreements = SaveAgreements(ranks, chain.descriptors)
        self._ranks = ranks
        self._options = options
        self._chain = chain
        self._lock = threading.RLock()
        self._structures = StructureCache()
        self._plans = PlanCache()
        self._attempts: defaultdict[str, Iterator[int]] = defaultdict(partial(count, 1))
        self._calls = count(1)

    def name(self, location: str) -> SaveName:
        """The name of this call of ``save``. Whatever becomes of it, it counts, so that all ranks agree on the next."""
        with self._lock:
            attempt = next(self._attempts[location])  # in one step, which no signal's handler can come between
            return SaveName(make_save_id(self.run_id, location, attempt), next(self._calls))

    def describe(self, flat: FlatState) -> Described:
        """The structure of what this rank holds, and the tensors."""
        return self._structures.describe(flat)

    def plan(self, structure: Structure) -> SavePlan:
        """The plan of a structure, made or remembered."""
        with self._lock:
            return self._plans.get(structure)

    def held(self, flat: FlatState, described: Described, *, marked: bool) -> Holdings:
        """What this rank holds, for an agreement."""
        return holdings(flat, described.structure, described.sources, marked=marked)

    def planning(
        self, order: SaveOrder, flat: FlatState, described: Described, trace: Trace
    ) -> Callable[[], Awaitable[Planned]]:
        """What gives a save its plan when its turn has come. A sole rank's is made now."""
        if self._ranks.world_size == 1:
            planned = self._planned(order, described.structure, flat.values, trace)

            async def given() -> Planned:
                return planned

            return given
        marked = self.held(flat, described, marked=True) if self.agreements.wanted else None
        order = replace(order, keys=None if order.keys is None else [*order.keys])  # the list is the caller's

        async def agreed() -> Planned:
            def held() -> Holdings:
                return marked or self.held(flat, described, marked=False)

            async with self.agreements.order:
                self.agreements.join(order.name.number)
                await self.agreements.check_place(order.storage, order.name.save_id)
                share = await self.agreements.share(order.name.number, described.structure, held)
            planned = await to_thread.run_sync(self._planned, order, share.structure, flat.values, trace)
            return replace(planned, picks=[_rows(pick) for pick in share.picks])

        return agreed

    def _planned(self, order: SaveOrder, structure: Structure, values: Mapping[str, Any], trace: Trace) -> Planned:
        plan = self.plan(structure)
        trace.total = sum(image.size for image in plan.images)
        job = make_job(
            order.name.save_id,
            plan,
            values,
            self._options.save_deadline,
            overwrite=order.overwrite,
            metadata=order.metadata,
            transforms=self._chain.descriptors,
        )
        keys = [] if order.keys is None else [*order.keys]
        return Planned(plan, structs.replace(job, run=order.run, world_size=self._ranks.world_size, keys=keys))

    async def tell_peers(self, name: SaveName, storage: Storage, error: AsyncDCPError) -> None:
        """Says to the other ranks that this one gives a save up that no pipeline knows of. Never raises."""
        if self._ranks.world_size == 1:
            return
        with CancelScope(shield=True), move_on_after(self._options.settle_seconds):
            try:
                with cancelled_by_others():
                    await self.agreements.refuse(name.number, error)
                    world = (self._ranks.rank, self._ranks.world_size)
                    record = abort_record(name.save_id, world, error, dict(versions()))
                    sealer = self._chain.sealer(name.save_id)
                    await storage.claim(record_name(name.save_id), encode_record(record, sealer))
            except Exception:
                _logger.exception("the other ranks could not be told that the save %s is given up", name.save_id)

    async def renew(self, name: SaveName) -> None:
        """After a save that was aborted for a hole. Never raises."""
        try:
            await self.agreements.renew(name.save_id)
        except Exception:
            _logger.exception("the ranks could not agree anew after the save %s", name.save_id)


def _rows(pick: Pick) -> tuple[int, int, int]:
    """Which rows of its source a pick is."""
    if not pick.box.sizes:
        return pick.chunk, 0, 1
    begin = pick.box.offsets[0] - pick.held.offsets[0]
    return pick.chunk, begin, begin + pick.box.sizes[0]
