"""Options as frozen dataclasses, checked when they are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from asyncdcp.errors import InvalidOption

WhenBusy: TypeAlias = Literal["queue", "skip", "error"]
OnError: TypeAlias = Literal["raise", "warn"] | Callable[[BaseException], object]


@dataclass(frozen=True)
class Options:
    """How a checkpointer works. All waits of asyncdcp end by one of the deadlines here; all are in seconds."""

    staging_bytes: int | None = None
    """Bound of the staging arena in bytes; None stages a whole state at once, so that tensors are free the soonest."""
    when_busy: WhenBusy = "queue"
    """What a save does while an earlier one is under way: wait its turn, be skipped (``SaveSkipped``), or raise
    ``CheckpointerBusy``."""
    on_error: OnError = "raise"
    """What becomes of a failed save that nobody looked at, at the next verb or at close: raised as ``UnseenFailure``,
    warned of, or handed to a callable."""
    save_deadline: float = 1800.0
    """From the moment a save's turn comes until it is durable."""
    load_deadline: float = 1800.0
    close_deadline: float = 1800.0
    """How long ``close`` (and the interpreter's exit) waits for pending saves before it gives them up."""
    settle_seconds: float = 30.0
    """How long a save that is given up may take to settle (to win its Record with an abort, to end its writes) before
    it is left behind and its future fails with ``CommitUnknown``."""

    def __post_init__(self) -> None:
        if self.staging_bytes is not None and (not isinstance(self.staging_bytes, int) or self.staging_bytes < 1):
            raise InvalidOption(f"staging_bytes takes a positive number of bytes or None, not {self.staging_bytes!r}")
        if self.when_busy not in ("queue", "skip", "error"):
            raise InvalidOption(f"when_busy takes 'queue', 'skip' or 'error', not {self.when_busy!r}")
        if self.on_error not in ("raise", "warn") and not callable(self.on_error):
            raise InvalidOption(f"on_error takes 'raise', 'warn' or a callable, not {self.on_error!r}")
        for name in ("save_deadline", "load_deadline", "close_deadline", "settle_seconds"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise InvalidOption(f"{name} takes a positive number of seconds, not {value!r}")
