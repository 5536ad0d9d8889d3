"""Options as frozen dataclasses, checked when they are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from asyncdcp.errors import InvalidOption

WhenBusy: TypeAlias = Literal["queue", "skip", "error"]
IOPriority: TypeAlias = Literal["idle", 0, 1, 2, 3, 4, 5, 6, 7]
OnError: TypeAlias = Literal["raise", "warn"] | Callable[[BaseException], object]


def check_flags(**flags: object) -> None:
    """``InvalidOption`` for a flag that is not a bool: "no" would count as a yes."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise InvalidOption(f"{name} takes True or False, not {value!r:.80}")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a checkpointer works. All waits of asyncdcp end by one of the deadlines here; all are in seconds.

    >>> asyncdcp.Options(staging_bytes=1 << 30, when_busy="skip").worker_nice
    10
    >>> asyncdcp.Options(save_deadline=0)
    Traceback (most recent call last):
    asyncdcp.errors.InvalidOption: save_deadline takes a positive number of seconds, not 0
    """

    staging_bytes: int | None = None
    """Bound of the staging arena in bytes, of which it takes at least 8 MiB; None stages a whole state at once, so that
    tensors are free the soonest.
    """
    when_busy: WhenBusy = "queue"
    """What a save does while an earlier one is under way: wait its turn, be skipped (``SaveSkipped``), or raise
    ``CheckpointerBusy``."""
    on_error: OnError = "raise"
    """What becomes of a failed save that nobody looked at, at the next verb or at close: raised as ``UnseenFailure``,
    warned of, or handed to a callable."""
    eager_bytes: int = 64 << 20
    """How many bytes of what a guard does not protect may be cloned before ``save`` returns, over all pending saves."""
    guard_deadline: float = 60.0
    """How long a guarded step waits for staging before the save is dropped."""
    save_deadline: float = 1800.0
    """From the moment a save's turn comes until it is durable."""
    load_deadline: float = 1800.0
    agreement_deadline: float = 300.0
    """How long the ranks of a job wait for each other where they agree: when a checkpointer is made, at the first save
    or ``prepare``, and at a load. All ranks give the same."""
    close_deadline: float = 1800.0
    """How long ``close`` (and the interpreter's exit) waits for pending saves before it gives them up."""
    settle_seconds: float = 30.0
    """How long a save that is given up may take to settle (to win its Record with an abort, to end its writes) before
    it is left behind and its future fails with ``CommitUnknown``."""
    worker_nice: int = 10
    """What is added to the niceness of the background process: 0 to 19, the higher the more it yields to training."""
    worker_io_priority: IOPriority | None = None
    """The background process's I/O class: "idle", or the level in the class best-effort (0 the first, 7 the last); None
    leaves it to the niceness. Only some I/O schedulers look at it."""
    worker_affinity: frozenset[int] | None = None
    """The CPUs the background process may run on; None: those of the trainer."""
    worker_start_deadline: float = 60.0
    """How long the background process may take to start."""

    def __post_init__(self) -> None:
        size = self.staging_bytes
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise InvalidOption(f"staging_bytes takes a positive number of bytes or None, not {self.staging_bytes!r}")
        if self.when_busy not in ("queue", "skip", "error"):
            raise InvalidOption(f"when_busy takes 'queue', 'skip' or 'error', not {self.when_busy!r}")
        if self.on_error not in ("raise", "warn") and not callable(self.on_error):
            raise InvalidOption(f"on_error takes 'raise', 'warn' or a callable, not {self.on_error!r}")
        if isinstance(self.eager_bytes, bool) or not isinstance(self.eager_bytes, int) or self.eager_bytes < 0:
            raise InvalidOption(f"eager_bytes takes a number of bytes, not {self.eager_bytes!r}")
        self._check_worker()
        for name in (
            "guard_deadline",
            "save_deadline",
            "load_deadline",
            "agreement_deadline",
            "close_deadline",
            "settle_seconds",
            "worker_start_deadline",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise InvalidOption(f"{name} takes a positive number of seconds, not {value!r}")

    def _check_worker(self) -> None:
        if self.worker_nice not in range(20):
            raise InvalidOption(f"worker_nice takes 0 to 19, not {self.worker_nice!r}")
        if self.worker_io_priority not in ("idle", None, *range(8)):
            raise InvalidOption(f"worker_io_priority takes 'idle', 0 to 7 or None, not {self.worker_io_priority!r}")
        cpus = self.worker_affinity
        if cpus is not None and (not cpus or any(not isinstance(cpu, int) or cpu < 0 for cpu in cpus)):
            raise InvalidOption(f"worker_affinity takes a set of CPU numbers or None, not {cpus!r}")


def known_options(options: Options | None) -> Options:
    """The options that a user gave, or the defaults; ``InvalidOption`` for what are none."""
    if not isinstance(options, Options | None):
        raise InvalidOption(f"options takes an Options, such as Options(staging_bytes=1 << 30), not {options!r:.80}")
    return options or Options()
