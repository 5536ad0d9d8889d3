"""Options of a transport, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from asyncdcp.errors import InvalidOption
from asyncdcp.transport.wire import AHEAD, BATCH_BLOCKS

_PAGE = 4096
_LEAST = AHEAD * BATCH_BLOCKS * _PAGE


@dataclass(frozen=True)
class TransportOptions:
    """How a ``PGTransport`` moves states."""

    buffer_bytes: int = 64 << 20
    """Bound of the memory that a transfer takes beyond the tensors, on either side; two halves of it are on their way
    in turn. All ranks may give different ones: the sender's counts."""
    staging: Literal["bounded", "whole"] = "bounded"
    """What a sender copies. "bounded": at most ``buffer_bytes`` at a time, and large contiguous tensors not at all;
    they may be changed once all is sent. "whole": the whole state, at once, so that it may be changed the soonest."""
    checksums: bool = True
    """Whether every block is verified. The sender's counts. On accelerators each block is copied to the host for it."""
    shared_memory: bool = True
    """Whether blocks that are on the host go to a receiver on the same host by memory that both map, not by the group.
    The sender's counts, with ``staging="bounded"``. Where a receiver may not open it, they go by the group."""
    eager_bytes: int = 64 << 20
    """As ``Options.eager_bytes``."""
    guard_deadline: float = 60.0
    """How many seconds a guarded step waits before the transfer that holds it up is dropped."""

    def __post_init__(self) -> None:
        for name, least in (("buffer_bytes", _LEAST), ("eager_bytes", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidOption(f"{name} takes a number of bytes, at least {least}, not {value!r}")
        if self.staging not in ("bounded", "whole"):
            raise InvalidOption(f"staging takes 'bounded' or 'whole', not {self.staging!r}")
        if isinstance(self.guard_deadline, bool) or not self.guard_deadline > 0:
            raise InvalidOption(f"guard_deadline takes a positive number of seconds, not {self.guard_deadline!r}")

    @property
    def block_bytes(self) -> int:
        """The most bytes of a block: all blocks of the batches on their way make the bound."""
        return self.buffer_bytes // (AHEAD * BATCH_BLOCKS) // _PAGE * _PAGE
