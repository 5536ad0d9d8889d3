"""Resume equals no interruption: every stock optimizer, scheduler and kind of module, saved and loaded in the middle of
training.

Each case trains a few steps, saves, goes on; then a second program loads and goes on from there. Parameters, states and
losses must be equal bit for bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from asyncdcp import MemoryStorage, RNGState, SyncCheckpointer
from tests.conftest import Same
from tests.resume.models import make_model

OPTIMIZERS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
)


def make_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    kind = getattr(torch.optim, name)
    parameters: Any = [p for p in model.parameters() if p.requires_grad]
    if name == "SparseAdam":
        return torch.optim.SparseAdam(parameters, lr=1e-2)
    if name == "Muon":
        return torch.optim.Muon([p for p in parameters if p.ndim == 2], lr=1e-2)
    return kind(parameters, lr=1e-2)


def step(model: Any, optimizer: torch.optim.Optimizer, sparse: bool) -> float:
    inputs, targets = torch.randn(16, 6), torch.randn(16, 2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        if sparse:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.to_sparse()
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        return optimizer.step(closure).item()
    loss = closure()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("target", ["fresh", "stepped"])
@pytest.mark.parametrize("saved", ["fresh", "stepped", "partly frozen"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer(name: str, saved: str, target: str, checkpointer: SyncCheckpointer, same: Same) -> None:
    sparse = name == "SparseAdam"
    storage = MemoryStorage()

    def program() -> tuple[Any, torch.optim.Optimizer]:
        model = make_model()
        if saved == "partly frozen":
            for parameter in model[0].parameters():
                parameter.requires_grad = False
        return model, make_optimizer(name, model)

    model, optimizer = program()
    for _ in range(0 if saved == "fresh" else 3):
        step(model, optimizer, sparse)
    state = {"model": model, "optimizer": optimizer, "rng": RNGState(), "step": 3}
    checkpointer.save(storage, state)
    losses = [step(model, optimizer, sparse) for _ in range(3)]

    resumed, its_optimizer = program()
    for _ in range(0 if target == "fresh" else 2):
        step(resumed, its_optimizer, sparse)
    into = {"model": resumed, "optimizer": its_optimizer, "rng": RNGState(), "step": 0}
    if target == "stepped" and saved == "fresh":
        its_optimizer.state.clear()  # a fresh state has nothing to overwrite a stepped one with but emptiness
    assert checkpointer.load(storage, into) is into
    assert into["step"] == 3
    assert [step(resumed, its_optimizer, sparse) for _ in range(3)] == losses
    assert same(model.state_dict(), resumed.state_dict())
    assert same(optimizer.state_dict(), its_optimizer.state_dict())


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 0.9**n),
    "MultiplicativeLR": lambda o: torch.optim.lr_scheduler.MultiplicativeLR(o, lambda n: 0.95),
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: torch.optim.lr_scheduler.ConstantLR(o),
    "LinearLR": lambda o: torch.optim.lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 1e-3, 1e-2),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=20),
    "PolynomialLR": lambda o: torch.optim.lr_scheduler.PolynomialLR(o, 10),
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: torch.optim.lr_scheduler.ChainedScheduler(
        [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 1e-3),
}


def test_every_stock_scheduler_is_in_the_table() -> None:
    stock = {
        name
        for name, kind in vars(torch.optim.lr_scheduler).items()
        if inspect.isclass(kind)
        and issubclass(kind, torch.optim.lr_scheduler.LRScheduler)
        and not name.startswith("_")
        and name != "LRScheduler"
    }
    assert stock <= SCHEDULERS.keys()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler(name: str, checkpointer: SyncCheckpointer) -> None:
    def program() -> tuple[Any, torch.optim.Optimizer, Any]:
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
        return model, optimizer, SCHEDULERS[name](optimizer)

    def advance(optimizer: torch.optim.Optimizer, scheduler: Any) -> list[float]:
        rates = []
        for n in range(4):
            optimizer.step()
            scheduler.step(*([float(n)] if name == "ReduceLROnPlateau" else []))
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    storage = MemoryStorage()
    _, optimizer, scheduler = program()
    advance(optimizer, scheduler)
    checkpointer.save(storage, {"optimizer": optimizer, "scheduler": scheduler})
    expected = advance(optimizer, scheduler)
    _, resumed, its_scheduler = program()
    checkpointer.load(storage, {"optimizer": resumed, "scheduler": its_scheduler})
    assert advance(resumed, its_scheduler) == expected


def test_grad_scaler(checkpointer: SyncCheckpointer) -> None:
    for enabled in (True, False):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        if enabled:
            scaler.scale(torch.ones(1))  # makes its tensors
        storage = MemoryStorage()
        checkpointer.save(storage, {"scaler": scaler})
        other = torch.amp.GradScaler("cpu", init_scale=2.0, enabled=enabled)
        checkpointer.load(storage, {"scaler": other})
        assert other.state_dict() == scaler.state_dict()
        if enabled:
            assert other.get_scale() == 1024.0
