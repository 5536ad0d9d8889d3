"""Links: bytes from rank to rank, over connections of their own.

They are gloo's, made anew for each use, over the host's network and the store by which the processes have met. So they
serve a job of whatever backend, and can neither disturb its collectives nor be held up by them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, Final

import torch
import torch.distributed as dist
from anyio import CancelScope, CapacityLimiter, move_on_after, to_thread
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]  # torch exports it without saying so

from asyncdcp.errors import AsyncDCPError, PeerError, PeerFailed, UsageError

_THREADS: Final = 16
_PARTING_TAG: Final = (1 << 31) - 1
_AT_ONCE: Final = timedelta(milliseconds=1)
_PARTING_SECONDS: Final = 5.0


class Links:
    """Connections among all ranks. Sends and receives of one pair of ranks meet by their tag and have one length.

    A wait that fails, is cancelled, or ends by the deadline leaves the connections of no use: ``abort`` then, so that
    the peers hear of it at once. Buffers may then be written to for a moment more.
    """

    def __init__(self, group: Any, store: Store, rank: int, world_size: int, until: float) -> None:
        self._group = group
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._until = until
        self._threads = CapacityLimiter(_THREADS)

    @classmethod
    async def connect(cls, store: Store, rank: int, world_size: int, *, deadline: float, until: float) -> Links:
        """Collective: returns when all ranks are connected. Waits end at ``until`` on the monotonic clock."""
        if not dist.is_gloo_available():
            raise UsageError("this torch was built without gloo, by which ranks pass on what they have read")
        attempt = _Attempt(store, rank)
        try:
            group = await to_thread.run_sync(attempt.make, world_size, deadline, abandon_on_cancel=True)
        except BaseException as error:
            await _in_time(attempt.give_up)
            if isinstance(error, RuntimeError):
                raise PeerError(f"the ranks could not connect to each other: {_first_line(error)}") from error
            raise
        return cls(group, store, rank, world_size, until)

    async def send(self, messages: Sequence[tuple[Sequence[int], int, memoryview]]) -> None:
        """Sends each ``(peers, tag, data)``, all at once; returns when the data has left."""

        def wait() -> None:
            begun = [
                (peer, self._begun(self._group.send, _tensor(data), peer, tag))
                for peers, tag, data in messages
                for peer in peers
            ]
            for peer, work in begun:
                self._finish(peer, work)

        await to_thread.run_sync(wait, abandon_on_cancel=True, limiter=self._threads)

    async def receive(self, peer: int, tag: int, into: memoryview) -> None:
        """Returns when ``into`` is full."""

        def wait() -> None:
            self._finish(peer, self._begun(self._group.recv, _tensor(into), peer, tag))

        await to_thread.run_sync(wait, abandon_on_cancel=True, limiter=self._threads)

    async def aclose(self) -> None:
        """Once all ranks are done: takes out of the store what connecting has left there. Never raises."""
        await _in_time(partial(_forget, self._store, self._rank))

    async def abort(self) -> None:
        """Closes all connections: what waits for them, here and on the peers, fails at once. Never raises."""
        with CancelScope(shield=True):
            await to_thread.run_sync(self._part, limiter=CapacityLimiter(1))

    def _part(self) -> None:
        """gloo closes connections where a wait has timed out, all of them, and in no other way. A peer that has closed
        its own already is no more waited for.
        """
        until = time.monotonic() + _PARTING_SECONDS
        for peer in range(self._world_size):
            if peer == self._rank or time.monotonic() > until:
                continue
            with suppress(RuntimeError):
                nothing = torch.empty(1, dtype=torch.uint8)
                try:
                    self._group.recv([nothing], peer, _PARTING_TAG).wait(_AT_ONCE)
                except RuntimeError as error:
                    if _is_late(error):
                        return
                    raise

    def _begun(self, begin: Callable[..., Any], data: Tensor, peer: int, tag: int) -> Any:
        try:
            return begin([data], peer, tag)
        except RuntimeError as error:
            raise self._lost(peer, error) from error

    def _finish(self, peer: int, work: Any) -> None:
        left = max(self._until - time.monotonic(), 0.001)
        try:
            work.wait(timedelta(seconds=left))
        except RuntimeError as error:
            raise self._lost(peer, error) from error

    def _lost(self, peer: int, error: RuntimeError) -> AsyncDCPError:
        what = "was not done in time" if _is_late(error) else "broke off"
        return PeerFailed(f"what rank {peer} passes on, or takes, {what}: {_first_line(error)}", rank=peer)


class _Attempt:
    """Connecting, on a thread that cannot be stopped. What fails, or is wanted no more, leaves nothing in the store."""

    def __init__(self, store: Store, rank: int) -> None:
        self._store = store
        self._rank = rank
        self._lock = threading.Lock()
        self._ended = self._given_up = False

    def make(self, world_size: int, deadline: float) -> Any:
        """The group. Blocks; on a thread."""
        try:
            return dist.ProcessGroupGloo(self._store, self._rank, world_size, timedelta(seconds=deadline))
        finally:
            self._change(ended=True)

    def give_up(self) -> None:
        """Nobody waits for it any more. Blocks; on a thread."""
        self._change(given_up=True)

    def _change(self, *, ended: bool = False, given_up: bool = False) -> None:
        """Whichever comes last tidies up."""
        with self._lock:
            self._ended, self._given_up = self._ended or ended, self._given_up or given_up
            both = self._ended and self._given_up
        if both:
            _forget(self._store, self._rank)


def _forget(store: Store, rank: int) -> None:
    """Deletes a rank's address, under the name that gloo gives it. Blocks, and never raises."""
    with suppress(RuntimeError):
        store.delete_key(f"0/{rank}")


async def _in_time(tidy: Callable[[], None]) -> None:
    """Tidies up on a thread, also where the caller is cancelled. A store that does not answer is not waited for."""
    with move_on_after(_PARTING_SECONDS, shield=True):
        await to_thread.run_sync(tidy, abandon_on_cancel=True)


def _tensor(data: memoryview) -> Tensor:
    return torch.frombuffer(data, dtype=torch.uint8)


def _is_late(error: RuntimeError) -> bool:
    return "imed out" in str(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
