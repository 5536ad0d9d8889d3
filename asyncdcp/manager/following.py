"""Readers of a run that goes on: evaluators, generators, exporters."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import anyio
import torch

from asyncdcp.checkpointer.read_verbs import OnProgress
from asyncdcp.errors import Closed, InvalidOption
from asyncdcp.extensions import Extension, ExtensionRegistry
from asyncdcp.futures import CheckpointFuture
from asyncdcp.manager.manager import CheckpointManager
from asyncdcp.manager.read_verbs import StateT
from asyncdcp.pipeline.descriptions import OtherWorld
from asyncdcp.ranks import SoleRank
from asyncdcp.runs import Checkpoint
from asyncdcp.runs.layout import check_step
from asyncdcp.storage import Place


class Published:
    """A committed checkpoint that ``follow`` has come upon. ``checkpoint`` says all that a listing knows of it."""

    def __init__(self, checkpoint: Checkpoint, load: Callable[..., CheckpointFuture[Any]]) -> None:
        self.checkpoint = checkpoint
        self._load = load

    @property
    def step(self) -> int:
        """Its step."""
        return self.checkpoint.step

    def __repr__(self) -> str:
        return f"<Published step {self.step}>"

    def load(  # noqa: PLR0913  # the vocabulary of loading
        self,
        state: StateT | None = None,
        *,
        strict: bool = True,
        cast: Literal["error", "allow"] = "error",
        keys: Sequence[str] | None = None,
        rename: Mapping[str, str] | Callable[[str], str] | None = None,
        device: torch.device | str = "cpu",
        assign: bool = False,
        allow_pickle: bool = False,
        per_rank: OtherWorld = "error",
        on_progress: OnProgress | None = None,
    ) -> CheckpointFuture[StateT]:
        """Begins to load it, into ``state`` or as a new state, as ``AsyncCheckpointer.load`` does, for
        this process alone.

        ``Closed`` after ``follow`` was; a loop that was left by ``break`` without ``aclosing`` closes it at once.
        ``CheckpointGone`` if retention has deleted it, even if that happens while it is read: go on to the next one.
        """
        load = partial(self._load, self.checkpoint, state, strict=strict, cast=cast, keys=keys, rename=rename)
        load = partial(load, device=device, assign=assign, allow_pickle=allow_pickle)
        try:
            return load(per_rank=per_rank, on_progress=on_progress)
        except Closed as error:
            raise Closed(
                f"step {self.step} cannot be loaded by what follow() yielded, since that was closed; "
                f"load it before, or by CheckpointManager(run, read_only=True).load({self.step})"
            ) from error


def follow(
    run: str | os.PathLike[str] | Place,
    *,
    after: int | None = None,
    every: Literal["newest", "all"] = "newest",
    poll_seconds: float = 1.0,
    extensions: Sequence[Extension] = (),
    registry: ExtensionRegistry | None = None,
) -> AsyncGenerator[Published, None]:
    """Comes upon the checkpoints of a run as they are committed: ``async for published in asyncdcp.follow(run)``.

    First what is there already, unless it is not beyond the step ``after``; then it looks every ``poll_seconds``, for
    ever. ``every="newest"`` leaves out what a newer one has overtaken meanwhile; "all" yields each that is on the run's
    line when it looks, in the order of steps. After a rollback of the run, steps come anew. Nothing is claimed and
    nothing written, and the run need not exist yet. Who stops before its end closes it, as with
    ``contextlib.aclosing``. ``extensions`` and ``registry`` are as for ``AsyncCheckpointer``; ``KeyUnavailable`` where
    the newest checkpoint hides its metadata and its key is not at hand.

    >>> import asyncio
    >>> from contextlib import aclosing
    >>> with asyncdcp.CheckpointManager("runs/followed", process=False) as manager:
    ...     _ = manager.save(1, {"weight": torch.ones(2)})
    >>> async def newest() -> object:
    ...     async with aclosing(asyncdcp.follow("runs/followed")) as run:
    ...         async for published in run:
    ...             return await published.load()
    >>> asyncio.run(newest())
    {'weight': tensor([1., 1.])}
    """
    if every not in ("newest", "all"):
        raise InvalidOption(f"every takes 'newest' or 'all', not {every!r}")
    if isinstance(poll_seconds, bool) or not isinstance(poll_seconds, (int, float)) or not poll_seconds > 0:
        raise InvalidOption(f"poll_seconds takes a positive number of seconds, not {poll_seconds!r}")
    before = -1 if after is None else check_step(after)
    make = partial(CheckpointManager, run, read_only=True, process=False, process_group=SoleRank())
    return _follow(partial(make, extensions=extensions, registry=registry), before, every, poll_seconds)


async def _follow(
    make: Callable[[], CheckpointManager], before: int, every: Literal["newest", "all"], poll_seconds: float
) -> AsyncGenerator[Published, None]:
    """What ``follow`` returns; its manager is made with the first look."""
    seen: set[str | None] = set()
    async with make() as manager:
        while True:
            found = await manager.checkpoints()
            fresh = [each for each in found if each.save_id not in seen and (seen or each.step > before)]
            seen = {each.save_id for each in found}
            for checkpoint in fresh if every == "all" else fresh[-1:]:
                yield Published(checkpoint, manager.load)
            await anyio.sleep(poll_seconds)
