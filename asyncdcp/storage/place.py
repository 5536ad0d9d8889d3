"""The Place port: a Storage of Storages, as the directory of a run that holds one directory for each checkpoint.

It adds to ``Storage`` what a run needs and nothing more: to open a sub-place, to see all sub-places at a glance, to
add a line to a log, and to remove what is left of a sub-place. Names of sub-places are as ``check_name`` has them.
Errors and cancellation are as the Storage port has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeAlias

from asyncdcp.storage.port import Storage

Selects: TypeAlias = Callable[[str, str], bool]
"""``(sub-place, object) -> bool``: whether a survey is to read it. The place's own objects have the sub-place ""."""


class Found(NamedTuple):
    """An object in a survey: its length in bytes, and when it was last changed, by the *storage's* clock."""

    size: int
    modified: float


@dataclass
class Contents:
    """What a place, or a sub-place, holds.

    ``objects`` are as ``Storage.list`` gives them; ``temporaries`` are what an operation cut off has left, under names
    that no object can have. ``read`` has the bytes of the selected objects, ``unread`` says why one could not be read
    ("" stands for the listing itself). What vanished during the survey is in none of them. What fails by a limit of
    this process, such as that on open files, fails the survey: it says nothing of what is there.
    """

    objects: dict[str, Found] = field(default_factory=dict)
    temporaries: dict[str, Found] = field(default_factory=dict)
    read: dict[str, bytes] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)

    def modified(self) -> float:
        """When anything in it was last changed; 0 where it is empty."""
        return max((found.modified for found in (*self.objects.values(), *self.temporaries.values())), default=0.0)


@dataclass
class Survey:
    """A place at a glance: its own objects, and every sub-place by name. Not a snapshot: others write meanwhile."""

    own: Contents = field(default_factory=Contents)
    children: dict[str, Contents] = field(default_factory=dict)


class Place(Protocol):
    """One place that holds objects and sub-places. An instance is used on one event loop."""

    @property
    def storage(self) -> Storage:
        """The place's own objects."""
        ...

    def child(self, name: str) -> Storage:
        """A sub-place, which need not exist yet; ``InvalidOption`` for a bad name."""
        ...

    async def survey(self, selects: Selects, limit: int) -> Survey:
        """Everything that the place holds, and the bytes of what ``selects`` chooses, up to ``limit`` bytes each.

        Empty where the place does not exist. ``selects`` may be called on another thread.
        """
        ...

    async def append(self, name: str, line: bytes) -> None:
        """Adds a line to one of the place's own objects, made where it is missing; durable when this returns.

        For a log with one writer. A crash may leave a last line that is cut off; the next one begins anew all the same.
        """
        ...

    async def discard(self, name: str, temporaries: Sequence[str] = ()) -> None:
        """Removes these temporaries of a sub-place, and the sub-place itself if nothing is left in it.

        What is gone already is passed over.
        """
        ...
