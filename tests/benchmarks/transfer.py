"""Transfers of live state between processes on gloo, in turns; started by the case ``transport``.

python -m tests.benchmarks.transfer SIZE RECEIVERS ROUNDS
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Final, Protocol

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch exports it without saying so
from torch.distributed.checkpoint._pg_transport import PGTransport as TorchTransport
from torch.multiprocessing.spawn import start_processes

from asyncdcp.transport import PGTransport, TransportOptions
from tests.benchmarks.measuring import check_equal, clear
from tests.benchmarks.states import SHAPES, gpt2_adam, many_small, tensors_of

TIMEOUT: Final = 300.0
_TICK: Final = 0.001
SMALL_TENSORS: Final = {"gpt2": 20_000, "small": 4_000, "tiny": 50}

Samples = dict[str, dict[str, list[float]]]


class Subject(Protocol):
    """A way to bring the source's state to the receivers. ``send`` and ``receive`` block."""

    name: str

    def send(self, ranks: Sequence[int], state: Any) -> None: ...

    def receive(self, state: Any) -> None: ...

    def close(self) -> None: ...


class Own:
    """asyncdcp, on a group of its own."""

    def __init__(self, name: str, options: TransportOptions) -> None:
        self.name = name
        self._transport = PGTransport(dist.new_group(), timeout=TIMEOUT, options=options)

    def send(self, ranks: Sequence[int], state: Any) -> None:
        self._transport.send_checkpoint(ranks, state).result()

    def receive(self, state: Any) -> None:
        self._transport.recv_checkpoint(0, state).result()

    def close(self) -> None:
        self._transport.close()


class Torch:
    """torch's PGTransport, in place."""

    name = "torch PGTransport"

    def __init__(self, group: Any) -> None:
        self._group = group

    def send(self, ranks: Sequence[int], state: Any) -> None:
        self._made(None).send_checkpoint(list(ranks), state)

    def receive(self, state: Any) -> None:
        self._made(lambda: state).recv_checkpoint(0)

    def _made(self, target: Callable[[], object] | None) -> TorchTransport:
        return TorchTransport(self._group, timedelta(seconds=TIMEOUT), torch.device("cpu"), target)

    def close(self) -> None:
        pass


class Raw:
    """``send`` and ``recv`` of every tensor, all at once; nobody else can be faster on this group."""

    name = "raw send/recv"

    def __init__(self, group: Any) -> None:
        self._group = group

    def send(self, ranks: Sequence[int], state: Any) -> None:
        tensors = tensors_of(state).values()
        self._wait([self._group.send([tensor], rank, 1) for tensor in tensors for rank in ranks])

    def receive(self, state: Any) -> None:
        self._wait([self._group.recv([tensor], 0, 1) for tensor in tensors_of(state).values()])

    def _wait(self, works: Sequence[Any]) -> None:
        for work in works:
            work.wait(timedelta(seconds=TIMEOUT))

    def close(self) -> None:
        pass


OWN: Final = "asyncdcp"
UNVERIFIED: Final = "asyncdcp, no checksums"
BY_GROUP: Final = "asyncdcp, by the group"
BY_GROUP_UNVERIFIED: Final = "asyncdcp, by the group, no checksums"
WHOLE: Final = "asyncdcp, staged whole"


def subjects(group: Any) -> list[Subject]:
    """In the order of the first turn."""
    return [
        Own(OWN, TransportOptions()),
        Own(UNVERIFIED, TransportOptions(checksums=False)),
        Own(BY_GROUP, TransportOptions(shared_memory=False)),
        Own(BY_GROUP_UNVERIFIED, TransportOptions(shared_memory=False, checksums=False)),
        Own(WHOLE, TransportOptions(staging="whole")),
        Torch(group),
        Raw(group),
    ]


def _measure(rank: int, world: int, rounds: int, states: Mapping[str, Any]) -> Samples:
    """Every subject in turn; a first round to warm up is not counted, but checked."""
    group = dist.group.WORLD
    found: Samples = {}
    all_subjects = subjects(group)
    for number in range(rounds + 1):
        first = number % len(all_subjects)
        for subject in [*all_subjects[first:], *all_subjects[:first]]:
            for what, state in states.items():
                if what == "small" and subject.name == WHOLE:
                    continue
                if rank and not number:
                    clear(state)
                seconds = _turn(subject, rank, world, state)
                if not number:
                    _check(rank, state, subject.name)
                    continue
                metrics = found.setdefault(subject.name, {})
                metrics.setdefault(what, []).append(seconds)
                if what == "big":
                    late, extra = _watched_turn(subject, rank, world, state)
                    metrics.setdefault("lag p99", []).append(late)
                    metrics.setdefault("memory", []).append(extra)
    for subject in all_subjects:
        subject.close()
    return found


def _turn(subject: Subject, rank: int, world: int, state: Any) -> float:
    """Seconds until all ranks are done."""
    dist.barrier()
    begun = time.perf_counter()
    if rank:
        subject.receive(state)
    else:
        subject.send(range(1, world), state)
    dist.barrier()
    return time.perf_counter() - begun


def _watched_turn(subject: Subject, rank: int, world: int, state: Any) -> tuple[float, float]:
    """Lag of a loop of this process meanwhile, and memory taken. Not timed: looking costs 6 % of a core, and only those
    whose transfers leave the loop free would pay it.
    """
    dist.barrier()
    before, peak = _resident(), _Peak()
    with peak:
        late = asyncio.run(_with_lag(subject, rank, world, state))
    dist.barrier()
    return late, max(peak.bytes - before, 0.0)


async def _with_lag(subject: Subject, rank: int, world: int, state: Any) -> float:
    """The trainer's own loop ticks while the transfer goes on; torch's blocks it throughout."""
    late: list[float] = []

    async def tick() -> None:
        while True:
            due = time.perf_counter() + _TICK
            await asyncio.sleep(_TICK)
            late.append(time.perf_counter() - due)

    ticking = asyncio.create_task(tick())
    await asyncio.sleep(0)
    peers = range(1, world)
    if isinstance(subject, Own):
        transport = subject._transport
        await (transport.recv_checkpoint(0, state) if rank else transport.send_checkpoint(peers, state))
    elif rank:
        subject.receive(state)
    else:
        subject.send(peers, state)
    await asyncio.sleep(2 * _TICK)  # so that a tick that was kept waiting is counted
    ticking.cancel()
    late.sort()
    return late[min(len(late) * 99 // 100, len(late) - 1)]


def _check(rank: int, state: Any, who: str) -> None:
    """Every rank's state is made from one seed, so what arrived can be compared with a copy."""
    told = [None]
    if rank == 0:
        told = [{name: float(tensor.double().sum()) for name, tensor in tensors_of(state).items()}]  # type: ignore[list-item]
    dist.broadcast_object_list(told, src=0)
    sums: Any = told[0]
    own = {name: torch.tensor(float(tensor.double().sum())) for name, tensor in tensors_of(state).items()}
    check_equal({name: torch.tensor(value) for name, value in sums.items()}, own, who)


def _resident() -> float:
    with open("/proc/self/statm", "rb") as file:
        return float(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))


class _Peak:
    """The most memory while it is entered."""

    def __init__(self) -> None:
        self.bytes = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._over.wait(0.01):
            self.bytes = max(self.bytes, _resident())

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def run_rank(rank: int, world: int, port: int, size: str, rounds: int) -> None:
    """One process of the world; rank 0 prints what it has measured."""
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, world, rank == 0, timedelta(seconds=TIMEOUT))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT))
    states = {"big": gpt2_adam(SHAPES[size]), "small": many_small(SMALL_TENSORS[size])}
    found = _measure(rank, world, rounds, states)
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, found)
    if rank == 0:
        print(json.dumps(_worst(gathered)))
        sys.stdout.flush()
    dist.destroy_process_group()


def _worst(gathered: Sequence[Samples]) -> Samples:
    """Of each round the highest of all ranks."""
    return {
        subject: {
            metric: [max(each) for each in zip(*(rank[subject][metric] for rank in gathered), strict=True)]
            for metric in metrics
        }
        for subject, metrics in gathered[0].items()
    }


def main() -> None:
    """Prints one line of JSON: samples by subject and metric."""
    size, receivers, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = receivers + 1
    start_processes(run_rank, args=(world, port, size, rounds), nprocs=world, start_method="spawn")


if __name__ == "__main__":
    main()
