"""Four ranks load replicas: each reads all of them, or each a part that it sends to the others.

The ranks are threads of this process, with real connections over its own network, and the disk is its own: which of the
two is faster in a cluster depends on its storage and its network. What each reads from the disk does not.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Literal, NamedTuple

from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]  # torch exports them silently

from asyncdcp import AsyncCheckpointer, LoadReport
from asyncdcp.ranks import StoreRanks
from tests.benchmarks.measuring import Setting, check_equal, clear, drop_from_cache, place, timed, turns
from tests.benchmarks.results import Ratio, Results
from tests.benchmarks.states import SHAPES, gpt2_adam

RANKS: Final = 4


class Way(NamedTuple):
    """How replicas are loaded."""

    name: str
    replicas: Literal["read", "broadcast"]


WAYS: Final = (Way("asyncdcp, each reads all", "read"), Way("asyncdcp, one reads, all get", "broadcast"))


def run(setting: Setting) -> Results:
    """Both ways with a cold page cache."""
    results = Results("sharing", "GPT-2's parameters on 4 ranks of one machine; gigabytes are the most of any rank")
    results.order([way.name for way in WAYS])
    results.ratios = [Ratio("one reads / each reads", WAYS[1].name, "cold", WAYS[0].name, "cold")]
    store = HashStore()
    ranks = [StoreRanks(PrefixStore("job", store), rank, RANKS, deadline=300) for rank in range(RANKS)]
    with ThreadPoolExecutor(RANKS) as pool, place(setting) as folder:
        made = list(pool.map(lambda each: AsyncCheckpointer(process=False, process_group=each), ranks))
        source = gpt2_adam(SHAPES[setting.size])["model"]
        states = [{name: tensor.clone() for name, tensor in source.items()} for _ in ranks]
        list(pool.map(lambda each, state: each.save(folder, state).result(), made, states))
        for number, way in turns(setting, "sharing", WAYS, lambda way: way.name):
            drop_from_cache(folder)
            reports: list[LoadReport] = []

            def load(each: AsyncCheckpointer, state: Any, replicas: Any = way.replicas, into: Any = reports) -> None:
                future = each.load(folder, state, replicas=replicas)
                future.result()
                into.append(future.report)

            for state in states:
                clear(state)
            seconds = timed(lambda load=load: list(pool.map(load, made, states)))  # type: ignore[misc]  # bound at once
            for state in states:
                check_equal(source, state, way.name)
            if number:
                read, received = (max(each) / 1e9 for each in zip(*map(_bytes, reports), strict=True))
                results.add(way.name, cold=seconds, read_GB=read, received_GB=received)
        list(pool.map(AsyncCheckpointer.close, made))
    return results


def _bytes(report: LoadReport) -> tuple[int, int]:
    return report.read_bytes, report.received_bytes
