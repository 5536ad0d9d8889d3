"""A storage as typed data, so that another process can open the same one. What has no spec cannot travel."""

from __future__ import annotations

from typing import Literal, Protocol, TypeAlias, runtime_checkable

import msgspec

from asyncdcp.storage.port import Storage


class LocalSpec(msgspec.Struct, frozen=True, tag="local"):
    """A ``LocalStorage``. The path is bytes, as the system has it: a name need not be UTF-8."""

    path: bytes
    direct_io: bool = True


class Fault(msgspec.Struct, frozen=True):
    """What happens at one call of the operating system that a ``FaultyStorage`` makes.

    The ``number``-th call of ``operation`` (a method of ``Posix``, or "any") fails with ``errno``, or before it this
    process is stopped (SIGSTOP) or killed (SIGKILL), or its trainer is killed. ``sticky`` goes for all later calls
    of the operation too.
    """

    operation: str
    number: int
    action: Literal["errno", "stop", "kill", "kill-trainer"]
    errno: int = 0
    sticky: bool = False


class FaultySpec(msgspec.Struct, frozen=True, tag="faulty"):
    """A ``LocalStorage`` over an operating system that fails on purpose; for tests."""

    path: bytes
    faults: list[Fault]
    direct_io: bool = True


StorageSpec: TypeAlias = LocalSpec | FaultySpec


@runtime_checkable
class Travels(Protocol):
    """A ``Storage`` that another process may be able to open."""

    def spec(self) -> StorageSpec | None:
        """What ``open_spec`` opens there; None if this instance holds what cannot be described."""
        ...


def spec_of(storage: Storage) -> StorageSpec | None:
    """The storage's spec; None where it cannot travel."""
    return storage.spec() if isinstance(storage, Travels) else None
