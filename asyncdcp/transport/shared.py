"""Blocks between processes of one host: staged in memory that the receiver maps as well, instead of being sent.

That a receiver can open the memory and finds ``key`` there proves that it is the sender's: no names of hosts are
compared. The memory is a memfd, so nothing is left of it when both have ended, however they do.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from asyncdcp.arena import ALIGNMENT, Arena
from asyncdcp.errors import AsyncDCPError
from asyncdcp.transport.wire import AHEAD, BATCH_BLOCKS, SharedMemory

_KEY_BYTES: Final = 32


class SharedBlocks:
    """A slot for each block of the batches that are on their way: block n lies in slot n modulo their number.

    One more slot begins with the key. Who makes it and who opens it close it, each for itself; a block's tensor stays
    valid nevertheless.
    """

    def __init__(self, arena: Arena, key: bytes) -> None:
        self._arena = arena
        self._key = key
        self._slots = arena.slots - 1

    @classmethod
    def make(cls, blocks: int, largest: int) -> SharedBlocks | None:
        """For a stream of that many blocks, of at most ``largest`` bytes; None where there is no such memory."""
        if not blocks or not hasattr(os, "memfd_create"):
            return None
        try:
            arena = Arena(*_layout(blocks, largest))
        except (AsyncDCPError, OSError):
            return None
        made = cls(arena, secrets.token_bytes(_KEY_BYTES))
        try:
            os.pwrite(arena.fd, made._key, made._key_begin)  # a store would end in SIGBUS where no memory is left
        except OSError:
            made.close()
            return None
        return made

    @classmethod
    def open(cls, offered: SharedMemory, blocks: int, largest: int) -> SharedBlocks | None:
        """What the peer has made; None if it is not of this host, or may not be opened."""
        path, layout = Path("/proc", str(offered.pid), "fd", str(offered.fd)), _layout(blocks, largest)
        try:
            if not str(path.readlink()).startswith("/memfd:asyncdcp-"):  # another host's number may be anything here
                return None
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return None
        try:
            opened = cls(Arena.attach(fd, *layout), offered.key)
        except (AsyncDCPError, OSError):
            os.close(fd)
            return None
        if os.pread(fd, _KEY_BYTES, opened._key_begin) == offered.key:
            return opened
        opened.close()
        return None

    @property
    def offer(self) -> SharedMemory:
        """By which a receiver opens it."""
        return SharedMemory(os.getpid(), self._arena.fd, self._key)

    def block(self, number: int, length: int) -> Tensor:
        """The memory of a block."""
        return torch.frombuffer(self._arena.slot(number % self._slots), dtype=torch.uint8)[:length]

    def take(self, number: int, length: int) -> Tensor:
        """As ``block``, for who fills it: ``MemoryLimit`` where there is no memory left, and not SIGBUS."""
        if number < self._slots:
            self._arena.prefault_slot(number)
        return self.block(number, length)

    def close(self) -> None:
        """Idempotent."""
        self._arena.close()

    @property
    def _key_begin(self) -> int:
        return self._slots * self._arena.slot_bytes


def _layout(blocks: int, largest: int) -> tuple[int, int]:
    """Slots and their bytes."""
    return min(blocks, AHEAD * BATCH_BLOCKS) + 1, -(-largest // ALIGNMENT) * ALIGNMENT
