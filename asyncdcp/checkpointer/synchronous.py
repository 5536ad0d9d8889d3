"""SyncCheckpointer: the same verbs for programs without an event loop, each waiting for its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import update_wrapper
from types import TracebackType
from typing import Concatenate, ParamSpec, Protocol, Self, TypeVar

from torch.distributed import ProcessGroup

from asyncdcp.checkpointer.asynchronous import PROCESS_BY_DEFAULT, AsyncCheckpointer
from asyncdcp.config import Options
from asyncdcp.extensions import Extension, ExtensionRegistry
from asyncdcp.ranks import Ranks

P = ParamSpec("P")
T_co = TypeVar("T_co", covariant=True)


class _Pending(Protocol[T_co]):
    """A future or a handle."""

    def result(self) -> T_co: ...


def _blocking(
    verb: Callable[Concatenate[AsyncCheckpointer, P], _Pending[T_co]],
) -> Callable[Concatenate[SyncCheckpointer, P], T_co]:
    """The verb with the same signature, which returns what its future resolves to."""

    def wait(self: SyncCheckpointer, /, *args: P.args, **kwargs: P.kwargs) -> T_co:
        return verb(self._inner, *args, **kwargs).result()

    update_wrapper(wait, verb)
    return wait


class SyncCheckpointer:
    """``AsyncCheckpointer`` with ``.result()`` after every verb: arguments, guarantees and errors are the same.

    ``save`` returns the ``SaveResult`` when the checkpoint is durable, ``load`` the state, ``prepare`` nothing.

    >>> with asyncdcp.SyncCheckpointer(process=False) as checkpointer:
    ...     result = checkpointer.save("by_hand", {"weight": torch.ones(3), "epoch": 1})
    ...     state = checkpointer.load("by_hand")
    >>> state
    {'weight': tensor([1., 1., 1.]), 'epoch': 1}
    """

    def __init__(
        self,
        options: Options | None = None,
        *,
        process: bool = PROCESS_BY_DEFAULT,
        process_group: ProcessGroup | Ranks | None = None,
        extensions: Sequence[Extension] = (),
        registry: ExtensionRegistry | None = None,
    ) -> None:
        self._inner = AsyncCheckpointer(
            options, process=process, process_group=process_group, extensions=extensions, registry=registry
        )
        self.ranks = self._inner.ranks

    save = _blocking(AsyncCheckpointer.save)
    prepare = _blocking(AsyncCheckpointer.prepare)
    load = _blocking(AsyncCheckpointer.load)
    verify = _blocking(AsyncCheckpointer.verify)

    def close(self) -> None:
        """As ``AsyncCheckpointer.close``."""
        self._inner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._inner.__exit__(kind, error, traceback)
