"""Ranks that are threads of one process: they meet in a store in memory, and save to one folder."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]  # torch exports them silently

from asyncdcp import AsyncCheckpointer, Options
from asyncdcp.boxes import Box
from asyncdcp.ranks import Decide, SoleRank, StoreRanks
from tests.work import leap

Everywhere = Callable[..., list[Any]]


def make_ranks(world_size: int, deadline: float = 30.0, store: Any = None) -> list[StoreRanks]:
    """All ranks of a job, each for a thread of its own."""
    meeting = store or HashStore()
    return [StoreRanks(PrefixStore("job", meeting), rank, world_size, deadline=deadline) for rank in range(world_size)]


class Late(StoreRanks):
    """A rank whose time is up once all those that ``come`` have told what they have to, and not before. Without
    any ``come`` it passes as ever.
    """

    come: Sequence[int] | None = None

    async def _take_part(self, key: str, told: bytes, decide: Decide) -> bytes:
        passing = asyncio.create_task(self._pass(key))
        try:
            return await super()._take_part(key, told, decide)
        finally:
            passing.cancel()

    async def _pass(self, key: str) -> None:
        async for _ in self._keys.poll():
            if self.come and await self._keys.there(*(f"{key}/told/{rank}" for rank in self.come)):
                leap(self.deadline)
                return


def late_ranks(world_size: int, come: Sequence[int]) -> list[Late]:
    """All ranks of a job to which only some of them ``come``."""
    meeting = HashStore()
    ranks = [Late(PrefixStore("job", meeting), rank, world_size, deadline=60.0) for rank in range(world_size)]
    for each in ranks:
        each.come = come
    return ranks


@pytest.fixture
def everywhere() -> Iterator[Everywhere]:
    """Calls a function once for each of some arguments, each on a thread, and returns the results, or the errors."""
    with ThreadPoolExecutor(16) as pool:

        def run(function: Callable[..., Any], *columns: Any) -> list[Any]:
            jobs: list[Future[Any]] = [pool.submit(function, *row) for row in zip(*columns, strict=True)]
            return [job.exception(60) or job.result() for job in jobs]

        yield run


class Piece(torch.Tensor):
    """A tensor of which this rank holds one box, as it says by torch's ``_Checkpointable`` protocol."""

    local: torch.Tensor
    box: Box

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], box: Box, local: torch.Tensor) -> Piece:
        made: Piece = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=local.dtype)
        made.local, made.box = local, box
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own stub lacks the classmethod
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(func)

    def __create_write_items__(self, fqn: str, _: object) -> list[Any]:
        chunk = SimpleNamespace(offsets=self.box.offsets, sizes=self.box.sizes)
        data = SimpleNamespace(chunk=chunk, size=self.shape)
        return [SimpleNamespace(index=None, tensor_data=data)]

    def __get_tensor_shard__(self, index: object) -> torch.Tensor:
        return self.local


def rows(whole: torch.Tensor, rank: int, world_size: int, *, filled: bool = True) -> Piece:
    """A rank's rows of a tensor; without content where it is not ``filled``."""
    size = -(-whole.shape[0] // world_size)
    begin, end = min(rank * size, whole.shape[0]), min((rank + 1) * size, whole.shape[0])
    local = whole[begin:end].clone()
    box = Box((begin, *(0,) * (whole.dim() - 1)), tuple(local.shape))
    return Piece(tuple(whole.shape), box, local if filled else torch.zeros_like(local))


class Job:
    """Several ranks with a checkpointer each."""

    def __init__(self, everywhere: Everywhere, ranks: list[Any], options: Options) -> None:
        self._everywhere = everywhere
        made = everywhere(lambda each: AsyncCheckpointer(options, process=False, process_group=each), ranks)
        self.checkpointers: list[AsyncCheckpointer] = made
        self.ranks = ranks

    def each(self, function: Callable[[AsyncCheckpointer, int], Any]) -> list[Any]:
        """What a function comes to on every rank: a result, or an error."""
        return self._everywhere(function, self.checkpointers, range(len(self.ranks)))

    def save(self, path: Path, state: Callable[[int], Any], **options: Any) -> list[Any]:
        return self.each(lambda each, rank: each.save(path, state(rank), **options).result(60))

    def load(self, path: Path, state: Callable[[int], Any], **options: Any) -> list[Any]:
        return self.each(lambda each, rank: each.load(path, state(rank), **options).result(60))

    def close(self) -> None:
        for error in self.each(lambda each, _: each.close()):
            if isinstance(error, BaseException):
                raise error

    @property
    def requests(self) -> list[int]:
        return [each.requests for each in self.ranks]


@pytest.fixture
def job(everywhere: Everywhere) -> Iterator[Callable[..., Job]]:
    """Makes jobs; a failure that the test has not looked at fails the test."""

    def make(world_size: int, deadline: float = 30.0, **options: Any) -> Job:
        ranks: list[Any] = [SoleRank()] if world_size == 1 else list(make_ranks(world_size, deadline))
        made = Job(everywhere, ranks, Options(**options))
        to_close.callback(made.close)
        return made

    with ExitStack() as to_close:  # all are closed, even if one of them has something to say
        yield make
