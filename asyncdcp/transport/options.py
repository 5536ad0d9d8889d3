"""Options of a transport, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from asyncdcp.config import check_flags
from asyncdcp.errors import InvalidOption
from asyncdcp.transport.wire import AHEAD, BATCH_BLOCKS, BLOCK_LIMIT

_PAGE = 4096
_LEAST = AHEAD * BATCH_BLOCKS * _PAGE


@dataclass(frozen=True)
class TransportOptions:
    """How a ``PGTransport`` moves states."""

    buffer_bytes: int = 64 << 20
    """Bound of the memory that a transfer takes beyond the tensors, on either side; two halves of it are on their way
    in turn. All ranks may give different ones: the sender's counts. What is shared is kept for further sends."""
    staging: Literal["bounded", "whole"] = "bounded"
    """What a sender copies. "bounded": at most ``buffer_bytes`` at a time, and large contiguous tensors only to share
    them; they may be changed once all is sent. "whole": all of the state at once, so that it may be changed the
    soonest."""
    checksums: bool = True
    """Whether every block is verified. The sender's counts. On accelerators each block is copied to the host for it."""
    shared_memory: bool = True
    """Whether a state larger than ``buffer_bytes`` goes to receivers on the same host by memory that both map, and not
    over the group, where the group's buffers are on the host. The sender's counts, with ``staging="bounded"``. To those
    who may not open it blocks go over the group, but from copies, as long as one takes them from there."""
    eager_bytes: int = 64 << 20
    """As ``Options.eager_bytes``."""
    guard_deadline: float = 60.0
    """How many seconds a guarded step waits before the transfer that holds it up is dropped."""

    def __post_init__(self) -> None:
        for name, least in (("buffer_bytes", _LEAST), ("eager_bytes", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidOption(f"{name} takes a number of bytes, at least {least}, not {value!r}")
        check_flags(checksums=self.checksums, shared_memory=self.shared_memory)
        if self.staging not in ("bounded", "whole"):
            raise InvalidOption(f"staging takes 'bounded' or 'whole', not {self.staging!r}")
        seconds = self.guard_deadline
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
            raise InvalidOption(f"guard_deadline takes a positive number of seconds, not {self.guard_deadline!r}")

    @property
    def shares(self) -> bool:
        """Whether a state's blocks may be shared."""
        return self.shared_memory and self.staging == "bounded"

    @property
    def block_bytes(self) -> int:
        """The most bytes of a block: all blocks of the batches on their way make the bound."""
        return min(self.buffer_bytes // (AHEAD * BATCH_BLOCKS) // _PAGE * _PAGE, BLOCK_LIMIT)
