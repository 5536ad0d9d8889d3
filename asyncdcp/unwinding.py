"""How errors leave what failed: out of task groups by themselves, and without the memory that their frames hold."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from traceback import clear_frames
from types import TracebackType
from typing import TypeVar

from anyio import create_task_group

ErrorT = TypeVar("ErrorT", bound=BaseException)


def first_error(group: BaseExceptionGroup[ErrorT]) -> ErrorT:
    """The first leaf of an exception group: what made a task group's other tasks end."""
    first = group.exceptions[0]
    return first_error(first) if isinstance(first, BaseExceptionGroup) else first


class ungrouped:  # in lower case, since it is used as a statement: with ungrouped(): async with create_task_group() …
    """Around a task group: what made it fail is raised by itself, with its own cause and context."""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, BaseExceptionGroup):
            first = first_error(error)
            context = first.__context__
            try:
                raise first
            finally:
                first.__context__ = context  # not the group, which holds it
                del first, error, context


@contextmanager
def cancelled_by_others() -> Iterator[None]:
    """A storage may let an ``asyncio.CancelledError`` out that nobody has asked for, which a task group takes for a
    good end, and others for a save that was given up: RuntimeError.
    """
    try:
        yield
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise RuntimeError("a task was cancelled, and nobody had asked for it") from error


async def all_of(work: Callable[[], Awaitable[None]], count: int) -> None:
    """Runs so many tasks of the same work at once, each ``frameless``. What makes one fail is raised by itself."""
    with ungrouped():
        async with create_task_group() as tasks:
            for _ in range(count):
                tasks.start_soon(frameless, work)


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
    """Runs a task that has tensors or views of a slab's memory: what it raises, a cancellation too, does not keep them.

    A task group's task and the error that ended it hold each other, so what is in its frames would stay until the
    garbage collector comes by; an arena of gigabytes with it.
    """
    try:
        with cancelled_by_others():
            await task()
    except BaseException as error:
        drop_frames(error)
        del task
        raise
