"""Many ranks, simulated in one process: what planning, describing and checking their checkpoint costs a rank.

Every tensor is sharded by rows over all ranks, as FSDP does: 1,024 ranks × 1,000 tensors are 1,024,000 chunks, of which
each rank writes 1,000. Nothing is stored, nothing is sent; processor seconds of one thread.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Final, NamedTuple, TypeVar

import msgspec

from asyncdcp.boxes import Box
from asyncdcp.envelope import IndexHead, decode_index, encode_index
from asyncdcp.format.blocks import BLOCK_BYTES, block_count
from asyncdcp.metadata import FileTable, Metadata, StorageMeta
from asyncdcp.names import data_name
from asyncdcp.pipeline.union import Union, unite
from asyncdcp.planning import ChunkSpec, SavePlan, Structure, TensorSpec, Want, plan_load
from asyncdcp.planning.division import divide
from asyncdcp.planning.held_chunks import Holdings, holdings_of
from asyncdcp.planning.save_plan import PlanCache
from tests.benchmarks.measuring import Setting, own_cpu
from tests.benchmarks.results import Budget, Results

T = TypeVar("T")

_WORLDS: Final = {"gpt2": (1024, 1000), "small": (64, 100), "tiny": (4, 5)}
_SAVE_ID: Final = "0" * 20
_ROWS, _COLUMNS = 2, 64
_RANK, _ALL = "asyncdcp, a rank", "asyncdcp, rank 0 for all"
_PLANS: Final = 8
"""Ranks of which planning is measured; what they do is alike."""


class World(NamedTuple):
    """``ranks`` that hold ``_ROWS`` rows each of every tensor."""

    ranks: int
    specs: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, ranks: int, tensors: int) -> World:
        """With tensors as the layers of a model have them."""
        shape = (ranks * _ROWS, _COLUMNS)
        return cls(ranks, tuple(TensorSpec(f"model.layers.{n}.weight", "float32", shape) for n in range(tensors)))

    def structure(self, rank: int) -> Structure:
        """What a rank is to write."""
        box = Box((rank * _ROWS, 0), (_ROWS, _COLUMNS))
        tree = {"dict": [[spec.name for spec in self.specs], [{"t": spec.name} for spec in self.specs]]}
        return Structure(self.specs, tuple(ChunkSpec(n, box) for n in range(len(self.specs))), {}, tree, rank)


def run(setting: Setting) -> Results:
    """Each step as many times as there are rounds."""
    world = World.of(*_WORLDS[setting.size])
    about = f"{world.ranks:,} ranks x {len(world.specs):,} tensors, {world.ranks * len(world.specs):,} chunks"
    results = Results("ranks", f"{about}; processor seconds")
    results.order([_RANK, _ALL])
    results.budgets = [
        Budget(_RANK, "repeated plan", 0.05),
        Budget(_ALL, "coverage", 2.0),
        Budget(_ALL, "divide", 3.0),
    ]
    for number in range(setting.rounds):
        setting.progress(f"ranks: round {number + 1} of {setting.rounds}")
        _divide(world, results)
        indexes = _describe(world, results)
        data = sum(map(len, indexes))
        decoded, seconds = _cpu(lambda data=indexes: [decode_index(one, "index") for one in data])  # type: ignore[misc]  # bound at once
        union, covered = _cpu(lambda all_=decoded: unite(all_))  # type: ignore[misc]
        results.add(_ALL, decode=seconds, coverage=covered)
        _plan_loads(world, union, results)
        results.notes = [f"an index has {data // world.ranks:,} bytes, all of them {data / 1e6:.4g} MB"]
        del indexes, decoded, union
        gc.collect()
    return results


def _describe(world: World, results: Results) -> list[bytes]:
    """The indexes as the ranks would write them. The first few are planned as a rank plans, and measured."""
    found = []
    for rank in range(world.ranks):
        cache = PlanCache()
        plan, first = _cpu(lambda rank=rank, cache=cache: cache.get(world.structure(rank)))  # type: ignore[misc]
        if rank < _PLANS:
            again, repeated = _cpu(lambda rank=rank, cache=cache: cache.get(world.structure(rank)))  # type: ignore[misc]
            assert again is plan
            results.add(_RANK, first_plan=first, repeated_plan=repeated)
        found.append(_index(rank, plan))
    return found


def _divide(world: World, results: Results) -> None:
    """Who writes what, from what all ranks tell to what each hears."""
    marks = [b""] * len(world.specs)
    told = [
        msgspec.msgpack.encode(holdings_of(world.structure(rank), lambda _: True, marks, {}))
        for rank in range(world.ranks)
    ]
    shares, seconds = _cpu(lambda: divide([msgspec.msgpack.decode(one, type=Holdings) for one in told]))
    results.add(_ALL, divide=seconds)
    assert len(shares.rows) == world.ranks


def _index(rank: int, plan: SavePlan) -> bytes:
    files = [
        FileTable(data_name(_SAVE_ID, rank, n, []), image.size, bytes(8 * block_count(image.size, BLOCK_BYTES)))
        for n, image in enumerate(plan.images)
    ]
    return encode_index(IndexHead(_SAVE_ID, rank, BLOCK_BYTES, []), plan.index_plan, b"{}", files)


def _plan_loads(world: World, union: Union, results: Results) -> None:
    """A rank of as many, and one of half as many."""
    meta = StorageMeta("", _SAVE_ID, world.ranks, 0.0, {})
    metadata = Metadata(union.tensors, union.storage, meta, union.aliases, union.tree, union.values)
    for name, rows in (("load_plan", _ROWS), ("load_plan,_half_as_many", 2 * _ROWS)):
        wants = [Want(spec.name, Box((world.ranks // 2 * _ROWS, 0), (rows, _COLUMNS))) for spec in world.specs]
        plan, seconds = _cpu(lambda wants=wants: plan_load(metadata, wants))  # type: ignore[misc]
        assert len(plan.items) == len(wants) * rows // _ROWS
        results.add(_RANK, **{name: seconds})


def _cpu(function: Callable[[], T]) -> tuple[T, float]:
    begun = own_cpu()
    return function(), own_cpu() - begun
