"""How errors leave what failed: out of task groups by themselves, and without the memory that their frames hold."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from traceback import clear_frames
from types import TracebackType
from typing import TypeVar

ErrorT = TypeVar("ErrorT", bound=BaseException)


def first_error(group: BaseExceptionGroup[ErrorT]) -> ErrorT:
    """The first leaf of an exception group: what made a task group's other tasks end."""
    first = group.exceptions[0]
    return first_error(first) if isinstance(first, BaseExceptionGroup) else first


class ungrouped:  # in lower case, since it is used as a statement: with ungrouped(): async with create_task_group() …
    """Around a task group: what made it fail is raised by itself, with its own cause."""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, BaseExceptionGroup):
            first = first_error(error)
            raise first from first.__cause__


def drop_frames(error: BaseException) -> None:
    """Empties the frames that an error's traceback keeps, and those of its causes and of what a group holds: they may
    hold tensors, or views of the arena, for as long as somebody holds the error. Frames that still run are left alone.

    Only for who made the work that failed, once all of it has ended: a generator or coroutine that has caught one of
    these errors and only waits just now would be closed by it, as a frame's ``clear`` does before Python 3.13. Others
    may hold error and traceback, and print them; who looks into the frames, as a debugger does, finds no locals there.
    """
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        each = waiting.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        clear_frames(each.__traceback__)
        waiting += [each.__cause__, each.__context__]
        if isinstance(each, BaseExceptionGroup):
            waiting += each.exceptions


async def frameless(task: Callable[[], Awaitable[None]]) -> None:
    """Runs a task that has views of a slab's memory: what it raises, a cancellation too, does not keep them.

    A task group's task and the error that ended it hold each other, so what is in its frames would stay until the
    garbage collector comes by; an arena of gigabytes with it.
    """
    try:
        await task()
    except BaseException as error:
        drop_frames(error)
        raise
