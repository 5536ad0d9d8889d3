"""PGTransport: live state from one rank to others, over a process group."""

from __future__ import annotations

import logging
import math
import threading
import time
import warnings
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from datetime import timedelta
from operator import index
from typing import Any, ClassVar, TypeVar, overload
from weakref import WeakSet

import msgspec
import torch
from torch.distributed import ProcessGroup

from asyncdcp.closing import Closing, weakly
from asyncdcp.engine import Engine
from asyncdcp.errors import Closed, InvalidOption, WouldDeadlock
from asyncdcp.futures import CheckpointFuture
from asyncdcp.results import Progress, ProgressMeter
from asyncdcp.staging import EagerBudget, Guard, Sources
from asyncdcp.state_dict.flatten import flatten
from asyncdcp.state_dict.structure import StructureCache
from asyncdcp.trace import Trace
from asyncdcp.transport.binding import Anew, InPlace
from asyncdcp.transport.endpoint import Turns
from asyncdcp.transport.handle import Outstanding, SendHandle
from asyncdcp.transport.link import Link, group_link
from asyncdcp.transport.offered import LayoutCache
from asyncdcp.transport.options import TransportOptions
from asyncdcp.transport.receiver import ReceiveTask
from asyncdcp.transport.sender import SendRequest, SendTask
from asyncdcp.transport.shared import SharedPool
from asyncdcp.transport.stream import StreamCache

StateT = TypeVar("StateT")
VerbT = TypeVar("VerbT", SendHandle, CheckpointFuture[Any])
OnProgress = Callable[[Progress], object]

_logger = logging.getLogger("asyncdcp.transport")

_STOP_SECONDS = 30.0


class PGTransport(Closing):
    """Sends states to other ranks and receives them, without storage.

    ``pg`` is a process group (None: torch's default one); only its ``send`` and ``recv`` are used, on threads of the
    transport's own. Give it a group of its own: on gloo a wait that times out closes the group, and on NCCL nothing
    else may be sent meanwhile. ``timeout`` (seconds, or a timedelta) is how long a rank waits while nothing moves, not
    how long a transfer may take. ``device`` is where the blocks are sent from and received to ("cuda" is the current
    one of who makes this); by default the host, where the group's backend takes that, else the current accelerator. A
    group has one open transport at a time (``InvalidOption``). Blocks on the host, of states larger than
    ``buffer_bytes``, go to a receiver on the same host by shared memory, if it may open that of the sender (the same
    user, in the same process namespace), and over the group otherwise; ``shared_memory`` of the options says no to it.

    A transfer begins when both sides have called, within ``timeout`` of each other. First they agree: what is missing,
    unexpected or of another shape or dtype is found before any tensor moves, and both sides fail, the receiver with
    ``StateMismatch``, the sender with ``PeerFailed``. A peer that dies, or does nothing for ``timeout``, fails the
    future with ``PeerFailed``, which names rank and tensors; the group may not be usable any more then. A receive that
    fails after the agreement leaves its state partly written, and says so; ``load_state_dict`` was not called.

    Transfers between the same two ranks in one direction take turns, in the order of the calls. A context manager,
    plain or async; leaving it waits for pending transfers, and raises what failed unseen.

    >>> from asyncdcp.transport import MemoryHub
    >>> hub = MemoryHub(2)  # for two ranks in one process; in a job: PGTransport(dist.new_group(), timeout=30)
    >>> healthy, fresh = (asyncdcp.PGTransport(hub.link(rank), timeout=30) for rank in (0, 1))
    >>> with healthy, fresh:
    ...     sending = healthy.send_checkpoint([1], {"weight": torch.ones(3)})
    ...     print(fresh.recv_checkpoint(0).result())
    ...     _ = sending.result()
    {'weight': tensor([1., 1., 1.])}
    """

    _noun = "transport"
    _open: ClassVar[WeakSet[PGTransport]] = WeakSet()

    def __init__(
        self,
        pg: ProcessGroup | Link | None,
        *,
        timeout: float | timedelta,
        device: torch.device | str | None = None,
        options: TransportOptions | None = None,
    ) -> None:
        seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
            raise InvalidOption(f"timeout takes a positive number of seconds, or a timedelta, not {timeout!r}")
        self.timeout = float(seconds)
        self.options = options or TransportOptions()
        self._link: Link = pg if hasattr(pg, "receive") else group_link(pg, device)  # type: ignore[assignment]  # a Link
        self._refuse_second()
        self.group: Any = pg
        """What it was made for."""
        self._lock = threading.RLock()  # reentrant, as all here: a signal's handler may send in the middle of a verb
        self._structures = StructureCache()
        self._layouts = LayoutCache()
        self._streams = StreamCache(self.options.block_bytes)
        self._may_share = self.options.shares and getattr(self._link, "may_share", False)
        self._pool = SharedPool(self.options.block_bytes)
        self._eager = EagerBudget(self.options.eager_bytes)
        self._guards: list[Guard] = []
        self._outstanding = Outstanding()
        self._turns = Turns()
        self._closed = self._ended = False
        self._engine = Engine("asyncdcp-transport", drain=weakly(self.close), exit_deadline=self.timeout)
        self._open.add(self)

    def _refuse_second(self) -> None:
        """On gloo a message that meets a receive of another size, as that of another transport, ends the process."""
        group = getattr(self._link, "group", None)
        if group is not None and any(getattr(other._link, "group", None) is group for other in list(self._open)):
            raise InvalidOption(
                "another PGTransport, which is open, has this process group: use that one for all transfers, close "
                "it, or give this one a group of its own (dist.new_group())"
            )

    @property
    def rank(self) -> int:
        """This process in the group."""
        return self._link.rank

    @property
    def world_size(self) -> int:
        """How many ranks the group has."""
        return self._link.world_size

    # ── the verbs ──

    def send_checkpoint(
        self, dst_ranks: Iterable[int], state_dict: Mapping[Any, Any], *, on_progress: OnProgress | None = None
    ) -> SendHandle:
        """Begins to send ``state_dict`` to all of ``dst_ranks`` at once, from one staging.

        What can be sent is what can be saved; it is flattened, and plain values are encoded, before this returns, and
        what cannot be sent is refused (``UnsupportedValue``, ``DuplicateName``). Tensors must not be changed until
        ``staged``; or see ``guard``. Of a DTensor this rank's shards are sent. A change that is seen fails the send and
        the receives (``TornSnapshotError``, ``ChecksumMismatch``).

        A receiver that fails does not stop the others; the handle then raises ``PeerFailed`` for the first of them, at
        the end. One that does nothing for ``timeout`` holds them up as long, and they give up too.
        """
        begun = time.monotonic()
        self._check_open()
        ranks = self._check_ranks(dst_ranks)
        flat = flatten(state_dict)
        described = self._structures.describe(flat)
        with self._lock:
            stream = self._streams.get(described.structure)
        values = msgspec.json.encode(flat.values)
        trace = self._trace("send", on_progress)
        trace.total = stream.plan.tensor_bytes * len(ranks)
        statefuls = (taken.stateful for taken in flat.statefuls.values())
        sources = Sources(described.sources, [g for g in self._guards if g.active], statefuls, self._eager)
        shares = self._may_share and stream.plan.tensor_bytes > self.options.buffer_bytes
        request = SendRequest(ranks, stream, values, sources, trace, begun, self._pool if shares else None)
        task = SendTask(request, self._engine, self._link, self.timeout, self.options)
        return self._begin(task.handle, task.run)

    @overload
    def recv_checkpoint(
        self, src_rank: int, into: None = None, *, on_progress: OnProgress | None = None
    ) -> CheckpointFuture[Any]: ...

    @overload
    def recv_checkpoint(
        self, src_rank: int, into: StateT, *, on_progress: OnProgress | None = None
    ) -> CheckpointFuture[StateT]: ...

    def recv_checkpoint(
        self, src_rank: int, into: Any = None, *, on_progress: OnProgress | None = None
    ) -> CheckpointFuture[Any]:
        """Begins to receive a state from ``src_rank``; resolves to it, with a ``ReceiveReport`` at the future's
        ``report``.

        Without ``into`` a new nested state is made, of CPU tensors. With it the rules are those of a load: tensors are
        filled in place, contiguous ones straight from the group or the shared memory; other Statefuls than modules take
        what the sender has; every ``load_state_dict`` is called, in order, after all has been verified. ``into`` must
        not be used until then. ``PerRank`` values are the sender's.
        """
        self._check_open()
        [src] = self._check_ranks([src_rank])
        binding = Anew() if into is None else InPlace(into, flatten(into, allow_meta=True))
        task = ReceiveTask(self._engine, self._link, src, self.timeout, binding, self._layouts)
        task.trace = self._trace("receive", on_progress)
        return self._begin(task.future, task.run)

    def _begin(self, verb: VerbT, run: Callable[[Turns], Awaitable[None]]) -> VerbT:
        with self._lock:
            self._refuse_closed()
            self._engine.submit(self._outstanding.during, run, self._turns, name=verb.name)
            self._outstanding.add(verb)  # not before: what cannot begin never ends
        return verb

    def guard(self, *optimizers: torch.optim.Optimizer) -> Guard:
        """As ``AsyncCheckpointer.guard``: every ``step`` waits until pending sends have read their tensors. One that
        has waited ``options.guard_deadline`` drops the send.
        """
        self._check_open()
        guard = Guard(optimizers, self._hold)
        self._guards = [*(old for old in self._guards if old.active), guard]
        return guard

    def _hold(self) -> None:
        if self._engine.inherited:
            return
        until = time.monotonic() + self.options.guard_deadline
        for handle in self._outstanding.unstaged():
            if not handle.hold(max(until - time.monotonic(), 0)):
                _logger.error("the %s is dropped: it held a step up too long", handle.sent.name)
                handle.cancel()
                handle.hold(_STOP_SECONDS)

    def submit(self, work: Callable[[], Any], name: str) -> CheckpointFuture[Any]:
        """Runs a coroutine function on the transport's own loop, for what is built upon it."""
        self._check_open()
        with self._lock:
            self._refuse_closed()
            future = self._engine.submit(self._outstanding.during, work, name=name)
            self._outstanding.add(future)
        return future

    def _check_ranks(self, ranks: Iterable[int]) -> tuple[int, ...]:
        try:
            found = tuple(index(rank) for rank in ranks)
        except TypeError:
            raise InvalidOption(f"a transfer takes ranks by their numbers, as [1, 2] to send, not {ranks!r}") from None
        others = set(range(self.world_size)) - {self.rank}
        if not found or len(set(found)) != len(found) or not others.issuperset(found):
            raise InvalidOption(
                f"rank {self.rank} of {self.world_size} cannot send to or receive from {list(found)!r}: that takes "
                "other ranks of the group, each once"
            )
        return found

    def _trace(self, stage: str, on_progress: OnProgress | None) -> Trace:
        meter = None if on_progress is None else ProgressMeter({stage: self._engine.callback(on_progress)})
        return Trace(meter)

    def _check_open(self) -> None:
        self._engine.check_process()
        self._refuse_closed()

    def _refuse_closed(self) -> None:
        if self._closed:
            raise Closed("the transport is closed")

    # ── the end ──

    def close(self) -> None:
        """Waits for pending transfers as long as they move, and ends the engine; safe to call twice. The process group
        stays. Raises what failed and nobody looked at, as ``UnseenFailure``. After it, verbs raise ``Closed``.
        """
        if self._engine.inherited:
            return
        if self._engine.owns_current_thread():
            raise WouldDeadlock("close() in a done callback would wait for that very callback")
        self._outstanding.wait()  # first of all: what is built upon the transport calls its verbs
        with self._lock:
            self._closed = True
        if self._ended:
            return
        for guard in self._guards:
            guard.remove()
        self._outstanding.wait()
        try:
            self._engine.close(self.timeout)
        finally:
            self._pool.close()
            self._open.discard(self)
        self._ended = True
        self._outstanding.surface()

    def __del__(self) -> None:
        engine: Engine | None = vars(self).get("_engine")
        if engine is None or self._closed or not engine.started or engine.inherited:
            return
        warnings.warn(f"unclosed {self!r}: its thread lives on", ResourceWarning, source=self, stacklevel=2)
        with suppress(Closed):
            engine.call(engine._stop, 0.0)
        self._pool.close()
