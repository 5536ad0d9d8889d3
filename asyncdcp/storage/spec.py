"""A storage as typed data, so that another process can open the same one. What has no spec cannot travel."""

from __future__ import annotations

from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import msgspec

from asyncdcp.errors import InvalidOption
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


class RequestLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long an object store is given; all in seconds.

    ``connect`` for a connection, ``request`` for one request with its body, ``retry`` from a request's first try to its
    last. A conditional PUT gets ``claim_request`` for one try and ``claim`` for all: its outcome is waited for even by
    who was cancelled. ``pause`` is about what lies between the first two tries; it doubles from one to the next.
    """

    connect: float = 10.0
    request: float = 120.0
    retry: float = 180.0
    claim_request: float = 10.0
    claim: float = 60.0
    pause: float = 0.1

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise InvalidOption(f"{name} takes a positive number of seconds, not {value!r}")


class ObjectStoreSpec(msgspec.Struct, frozen=True, tag="object-store"):
    """An ``ObjectStorage``. ``config`` may hold secrets, and so is shown by its keys only."""

    url: str
    config: dict[str, str]
    profile: str | None = None
    limits: RequestLimits = RequestLimits()

    def __repr__(self) -> str:
        return f"ObjectStoreSpec({self.url!r}, config of {', '.join(sorted(self.config)) or 'nothing'})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("url", self.url), ("config", sorted(self.config))]


StorageSpec: TypeAlias = LocalSpec | FaultySpec | ObjectStoreSpec


@runtime_checkable
class Travels(Protocol):
    """A ``Storage`` that another process may be able to open."""

    def spec(self) -> StorageSpec | None:
        """What ``open_spec`` opens there; None if this instance holds what cannot be described."""
        ...


def spec_of(storage: Storage) -> StorageSpec | None:
    """The storage's spec; None where it cannot travel."""
    return storage.spec() if isinstance(storage, Travels) else None
