"""Blocks between processes of one host: staged in memory that the receiver maps as well, instead of being sent.

That a receiver can open the memory and finds ``key`` there proves that it is the sender's: no names of hosts are
compared. The memory is a memfd, so nothing is left of it when both have ended, however they do.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import threading
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from asyncdcp.arena import ALIGNMENT, Arena
from asyncdcp.errors import AsyncDCPError, MemoryLimit
from asyncdcp.transport.wire import AHEAD, BATCH_BLOCKS, SharedMemory

_SLOTS: Final = AHEAD * BATCH_BLOCKS
_KEY_BYTES: Final = 32
_LARGEST: Final = 1 << 40


class SharedBlocks:
    """A slot for each block of the batches that are on their way: block n lies in slot n modulo their number.

    One more slot begins with the key, another one for every send. Who makes it and who opens it close it, each for
    itself; a block's tensor stays valid nevertheless.
    """

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._key = b""
        self._ready: set[int] = set()

    @classmethod
    def make(cls, slot_bytes: int) -> SharedBlocks | None:
        """For blocks of at most so many bytes; None where there is no such memory."""
        if not hasattr(os, "memfd_create"):
            return None
        try:
            return cls(Arena(_SLOTS + 1, slot_bytes))
        except (AsyncDCPError, OSError):
            return None

    @classmethod
    def open(cls, offered: SharedMemory, largest: int) -> SharedBlocks | None:
        """What the peer has made, for blocks of at most ``largest`` bytes; None if it is not of this host, or may not
        be opened.
        """
        if not largest <= offered.slot_bytes < _LARGEST or offered.slot_bytes % ALIGNMENT:
            return None
        path, key_begin = Path("/proc", str(offered.pid), "fd", str(offered.fd)), _SLOTS * offered.slot_bytes
        try:
            if not str(path.readlink()).startswith("/memfd:asyncdcp-"):  # another host's number may be anything here
                return None
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return None
        try:
            sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK  # else an access could end in SIGBUS
            if sealed and os.pread(fd, _KEY_BYTES, key_begin) == offered.key:
                return cls(Arena.attach(fd, _SLOTS + 1, offered.slot_bytes))
        except (AsyncDCPError, OSError):
            pass
        os.close(fd)
        return None

    def offer(self) -> SharedMemory | None:
        """By which the receivers of one send open it; None where no page of memory is left."""
        self._key = secrets.token_bytes(_KEY_BYTES)
        try:
            os.pwrite(self._arena.fd, self._key, _SLOTS * self._arena.slot_bytes)  # a store would end in SIGBUS
        except OSError:
            return None
        return SharedMemory(os.getpid(), self._arena.fd, self._arena.slot_bytes, self._key)

    def block(self, number: int, length: int) -> Tensor:
        """The memory of a block."""
        return torch.frombuffer(self._arena.slot(number % _SLOTS), dtype=torch.uint8)[:length]

    def take(self, number: int, length: int) -> Tensor:
        """As ``block``, for who fills it: ``MemoryLimit`` where there is no memory left, and not SIGBUS."""
        slot = number % _SLOTS
        if slot not in self._ready:
            try:
                self._arena.prefault_slot(slot)
            except MemoryLimit as error:
                raise MemoryLimit(
                    f"no memory is left for {length:,} bytes that are to be shared with a receiver on this host: give "
                    "the transport a smaller buffer_bytes=, or shared_memory=False"
                ) from error
            self._ready.add(slot)
        return self.block(number, length)

    def close(self) -> None:
        """Idempotent."""
        self._arena.close()


class SharedPool:
    """What a transport keeps between its sends: to take the memory anew would cost more than many a state."""

    def __init__(self, slot_bytes: int) -> None:
        self._slot_bytes = slot_bytes
        self._lock = threading.Lock()
        self._kept: SharedBlocks | None = None
        self._closed = False

    def take(self) -> SharedBlocks | None:
        """For one send; None where there is no such memory."""
        with self._lock:
            kept, self._kept = self._kept, None
        return kept or SharedBlocks.make(self._slot_bytes)

    def give(self, blocks: SharedBlocks) -> None:
        """Back, when nobody of this process uses it any more."""
        with self._lock:
            if not self._closed and self._kept is None:
                self._kept = blocks
                return
        blocks.close()

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            kept, self._kept, self._closed = self._kept, None, True
        if kept is not None:
            kept.close()
