"""A rank of a world on gloo: real processes, of which one dies. Started by ``test_group.py``.

python -m tests.transport.ranks RANK WORLD FOLDER
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore, Store  # type: ignore[attr-defined]  # torch exports them without saying so
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, distribute_tensor

from asyncdcp.transport import PGTransport, TransportOptions
from asyncdcp.transport.link import Link, Pending, group_link

LONG: Final = timedelta(seconds=60)
STALL_SECONDS: Final = 0.5
SMALL_BUFFERS: Final = TransportOptions(buffer_bytes=1 << 20)
BY_GROUP: Final = TransportOptions(buffer_bytes=1 << 20, shared_memory=False)


def state(seed: int, mesh: DeviceMesh) -> dict[str, Any]:
    """Large and small tensors, strided ones, a DTensor, plain values, a Stateful."""
    torch.manual_seed(seed)
    return {
        "w": torch.randn(700_000),
        "strided": torch.randn(300, 200).t(),
        "scalar": torch.tensor(float(seed)),
        "many": {str(n): torch.randn(64) for n in range(2000)},
        "sharded": distribute_tensor(torch.randn(40, 8), mesh, [Replicate()], src_data_rank=None),
        "model": torch.nn.Linear(20, 30),
        "seed": [seed, "x", None],
    }


def digest(found: Any) -> list[float]:
    """A few sums that no two seeds share."""
    many = sum(float(tensor.double().sum()) for tensor in found["many"].values())
    parts = (found["w"], found["strided"][7], found["scalar"], found["sharded"].to_local(), found["model"].weight)
    return [*(float(part.detach().double().sum()) for part in parts), many, *found["seed"]]


def transfer(rank: int, mesh: DeviceMesh, result: dict[str, Any]) -> None:
    """Rank 0 sends to all others at once: by shared memory, and by the group."""
    for turn in (1, 2):
        options = TransportOptions(buffer_bytes=1 << 20, shared_memory=turn == 1)
        with PGTransport(dist.new_group(timeout=LONG), timeout=LONG, options=options) as transport:
            own = state(turn if rank == 0 else 100 + rank, mesh)
            if rank == 0:
                transport.send_checkpoint(range(1, transport.world_size), own).result(60)
            else:
                received = transport.recv_checkpoint(0, own)
                received.result(60)
                result[f"shared {turn}"] = received.report.shared
            result[f"digest {turn}"] = digest(own)


def stall(rank: int, store: Store, result: dict[str, Any]) -> None:
    """Rank 1 does not come before rank 0 has given up."""
    group = dist.new_group([0, 1], timeout=LONG)
    if rank == 0:
        transport = PGTransport(group, timeout=STALL_SECONDS)
        begun = time.monotonic()
        error = transport.send_checkpoint([1], {"w": torch.ones(3)}).exception(60)
        result["stall"] = [type(error).__name__, str(error), time.monotonic() - begun]
        transport.close()
        store.set("given up", "1")
    elif rank == 1:
        store.wait(["given up"], LONG)


class Dying:
    """A link whose process dies by SIGKILL at its ``calls``-th send or receive."""

    def __init__(self, link: Link, calls: int) -> None:
        self._link = link
        self._left = calls
        self.rank, self.world_size, self.device = link.rank, link.world_size, link.device
        self.may_share = link.may_share

    def send(self, peer: int, tag: int, data: Tensor) -> Pending:
        self._count()
        return self._link.send(peer, tag, data)

    def receive(self, peer: int, tag: int, into: Tensor) -> Pending:
        self._count()
        return self._link.receive(peer, tag, into)

    def _count(self) -> None:
        self._left -= 1
        if not self._left:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_sender(rank: int, group: Any, result: dict[str, Any]) -> None:
    """Rank 1 dies by SIGKILL while it sends to rank 0."""
    if rank == 1:
        transport = PGTransport(Dying(group_link(group, None), 60), timeout=30, options=BY_GROUP)
        transport.send_checkpoint([0], {"w": torch.ones(8_000_000)}).result(60)
    begun = time.monotonic()
    transport = PGTransport(group, timeout=30, options=SMALL_BUFFERS)
    error = transport.recv_checkpoint(1, {"w": torch.zeros(8_000_000)}).exception(60)
    result["sender killed"] = {
        "kind": type(error).__name__,
        "rank": getattr(error, "rank", None),
        "tensors": getattr(error, "tensors", None),
        "said": str(error),
        "seconds": time.monotonic() - begun,
    }


def kill_receiver(rank: int, result: dict[str, Any]) -> None:
    """The last rank dies by SIGKILL in the middle; the others get it all."""
    group = dist.new_group(timeout=LONG)
    last = group.size() - 1
    link = group_link(group, None)
    transport = PGTransport(Dying(link, 30) if rank == last else link, timeout=30, options=SMALL_BUFFERS)
    begun = time.monotonic()

    if rank == 0:
        error = transport.send_checkpoint(range(1, last + 1), {"w": torch.arange(8_000_000.0)}).exception(60)
        result["kill"] = [
            type(error).__name__,
            getattr(error, "rank", None),
            getattr(error, "tensors", None),
            str(error),
        ]
        result["seconds"] = time.monotonic() - begun
    else:
        found = transport.recv_checkpoint(0).result(60)
        result["kill"] = bool(torch.equal(found["w"], torch.arange(8_000_000.0)))


def tell(result: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Prints one line of JSON."""
    faulthandler.dump_traceback_later(190, exit=True)
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    store = FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=LONG)
    mesh = DeviceMesh("cpu", list(range(world)))
    result: dict[str, Any] = {}
    transfer(rank, mesh, result)
    stall(rank, store, result)
    pair = dist.new_group([0, 1], timeout=LONG)  # while all are there to make it
    kill_receiver(rank, result)
    if rank == 1:
        tell(result)
    kill_sender(rank, pair, result)
    tell(result)
    os._exit(0)  # a group that has lost a rank cannot be taken apart in order


if __name__ == "__main__":
    main()
