"""What a transfer comes to, in numbers. Times in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class SendReport:
    """A state that all of ``ranks`` have received and verified."""

    ranks: tuple[int, ...]
    tensors: int
    bytes: int
    """Of the state's tensors; each rank got as many."""
    staged_seconds: float
    """Until the tensors could be changed again."""
    seconds: float

    @property
    def bytes_per_second(self) -> float:
        """To each rank."""
        return self.bytes / max(self.seconds, 1e-9)


@dataclass(frozen=True)
class ReceiveReport:
    """A state that was received from ``rank``; at the ``report`` of the future."""

    rank: int
    tensors: int
    bytes: int
    in_place_bytes: int
    """As many of them were received straight into tensors' memory."""
    shared: bool
    """Whether they came by memory shared with the sender, a process of the same host, and not over the group."""
    seconds: float
    """From the offer on: the wait for a sender to come is not counted."""
    stage_seconds: Mapping[str, float]

    @property
    def bytes_per_second(self) -> float:
        """Received, verified and delivered."""
        return self.bytes / max(self.seconds, 1e-9)
