"""How often a change during staging goes unseen, kind by kind, and what looking for it costs.

``python -m tests.benchmarks.torn [--trials N]``. The table in ``asyncdcp/staging/torn.py`` is from here.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from asyncdcp.staging.torn import Witness, versions

Made = tuple[list[Tensor], Callable[[], object]]
"""Tensors, and what changes them (not every one of them every time)."""


def _optimizer(kind: Any, gradient: Callable[[Tensor], Tensor], shape: tuple[int, ...], **options: Any) -> Made:
    """Parameter and state of an optimizer some steps under way, and its next step."""
    dtype = options.pop("dtype", torch.float32)
    parameter = nn.Parameter(torch.randn(shape).mul_(0.05).to(dtype))
    optimizer = kind([parameter], **options)

    def step() -> None:
        parameter.grad = gradient(parameter)
        optimizer.step()

    for _ in range(3):
        step()
    state = [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor)]
    return [parameter.detach(), *state], step


def _dense(parameter: Tensor) -> Tensor:
    return torch.randn_like(parameter).mul_(1e-3)


def _few_rows(parameter: Tensor) -> Tensor:
    gradient = torch.zeros_like(parameter)
    gradient[torch.randint(len(parameter), (64,))] = 1e-3
    return gradient


def _element() -> Made:
    tensor = torch.zeros(1_000_000)
    return [tensor], lambda: tensor.numpy().__setitem__(int(torch.randint(len(tensor), ())), 1.0)


def _row(rows: int) -> Made:
    table = nn.Embedding(rows, 256).weight.detach()
    return [table], lambda: table.data[int(torch.randint(rows, ()))].normal_()


def _batch_norm(channels: int) -> Made:
    norm = nn.BatchNorm1d(channels)
    statistics_ = [norm.running_mean, norm.running_var, norm.num_batches_tracked]
    return [tensor for tensor in statistics_ if tensor is not None], lambda: norm(torch.randn(8, channels))


_ADAMW, _SGD = torch.optim.AdamW, torch.optim.SGD
_MATRIX, _TABLE = (512, 512), (20_000, 64)
_FORMS: list[tuple[str, dict[str, Any]]] = [
    ("for-loop", {"foreach": False}),
    ("foreach", {"foreach": True}),
    ("fused", {"fused": True}),
]

KINDS: dict[str, Callable[[], Made]] = {
    **{
        f"AdamW fp32, lr 1e-3, {name}": partial(_optimizer, _ADAMW, _dense, _MATRIX, lr=1e-3, **form)
        for name, form in _FORMS
    },
    "AdamW bf16, lr 1e-3, fused": lambda: _optimizer(
        _ADAMW, _dense, _MATRIX, lr=1e-3, fused=True, dtype=torch.bfloat16
    ),
    "AdamW bf16, lr 1e-5, fused": lambda: _optimizer(
        _ADAMW, _dense, _MATRIX, lr=1e-5, fused=True, dtype=torch.bfloat16
    ),
    "AdamW fp32 fused, 64 of 20,000 rows": lambda: _optimizer(_ADAMW, _few_rows, _TABLE, lr=1e-3, fused=True),
    **{
        f"SGD fp32, lr 1e-2, momentum, {name}": partial(
            _optimizer, _SGD, _dense, _MATRIX, lr=1e-2, momentum=0.9, **form
        )
        for name, form in _FORMS
    },
    "SGD fp32 fused, 64 of 20,000 rows": lambda: _optimizer(_SGD, _few_rows, _TABLE, lr=1e-2, fused=True),
    "batch norm statistics, 64 channels": lambda: _batch_norm(64),
    "batch norm statistics, 4,096 channels": lambda: _batch_norm(4096),
    "one row of 20,000 by .data": lambda: _row(20_000),
    "one row of 100 by .data": lambda: _row(100),
    "one element of 1,000,000 by numpy": _element,
}


class Rate(NamedTuple):
    """What was missed, from 0 to 1.

    ``tensors`` are those that changed while they were copied and were not seen to; ``saves`` are those of which no
    changed tensor was seen, so that they pass; ``early`` likewise, where the change fell between the call of ``save``
    and the first copy, and only version counters can tell.
    """

    tensors: float
    saves: float
    early: float


def measure(make: Callable[[], Made], trials: int) -> Rate:
    """Repeats one kind of change."""
    changed = missed = saves = early = 0
    for trial in range(trials):
        torch.manual_seed(trial)
        tensors, change = make()
        old, before = [tensor.clone() for tensor in tensors], versions(tensors)
        watching = Witness(tensors, before, range(len(tensors)))
        change()
        moved = {n for n, tensor in enumerate(tensors) if not torch.equal(tensor, old[n])}
        changed += len(moved)
        seen = moved.intersection(watching.changed())
        missed += len(moved) - len(seen)
        saves += not seen
        early += not Witness(tensors, before, range(len(tensors))).changed()
    return Rate(missed / changed, saves / trials, early / trials)


def cost(count: int, nbytes: int, repeats: int = 5) -> float:
    """Milliseconds that all the looking at ``count`` tensors takes, caches cold; the median."""
    tensors = [torch.ones(nbytes // 4) for _ in range(count)]
    gc.collect()
    seconds = []
    for _ in range(repeats):
        torch.zeros(300 << 20, dtype=torch.uint8).add_(1)
        begun = time.perf_counter()
        Witness(tensors, versions(tensors), range(count)).changed()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=100)
    trials = parser.parse_args().trials
    print(f"{'':42} {'tensors missed':>16} {'saves that pass':>16} {'if before copying':>18}")
    for name, make in KINDS.items():
        rate = measure(make, trials)
        print(f"{name:42} {rate.tensors:16.1%} {rate.saves:16.1%} {rate.early:18.1%}")
    for count, nbytes in ((1_000, 1_500_000), (20_000, 1 << 10), (20_000, 20_000)):
        print(f"{count:,} tensors of {nbytes:,} bytes: {cost(count, nbytes):.1f} ms")


if __name__ == "__main__":
    main()
