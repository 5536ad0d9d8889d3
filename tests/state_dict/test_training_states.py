"""What trainers hold: every stock optimizer, scheduler and scaler of torch, flattened and put together again."""

from __future__ import annotations

import inspect
from typing import Any

import msgspec
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as lr

from asyncdcp.state_dict.flatten import flatten
from asyncdcp.state_dict.unflatten import unflatten

OPTIMIZERS = [
    kind
    for kind in vars(torch.optim).values()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
]
PICKY: dict[str, dict[str, Any]] = {"SGD": {"lr": 0.1, "momentum": 0.9}, "LBFGS": {"max_iter": 3}}


def again(stateful: Any) -> Any:
    flat = flatten({"s": stateful})
    tree, values = msgspec.json.decode(msgspec.json.encode([flat.tree, flat.values]))
    tensors = {name: tensor.detach().clone() for name, tensor in flat.tensors.items()}
    tensors.update({name: tensors[origin] for name, origin in flat.aliases.items()})
    return unflatten(tree, tensors, values)["s"]


def model_for(kind: type) -> nn.Module:
    torch.manual_seed(0)
    if kind.__name__ == "SparseAdam":
        return nn.Embedding(5, 3, sparse=True)
    return nn.Linear(3, 3, bias=kind.__name__ != "Muon")


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    sparse = isinstance(model, nn.Embedding)
    inputs = torch.tensor([1, 3]) if sparse else torch.linspace(-1, 1, 6).view(2, 3)

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(inputs).square().sum()
        loss.backward()
        return float(loss.detach())

    for _ in range(steps):
        optimizer.step(closure)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_optimizers_go_on_as_if_nothing_had_happened(same, kind, steps):
    model, other = model_for(kind), model_for(kind)
    optimizer = kind(model.parameters(), **PICKY.get(kind.__name__, {}))
    train(model, optimizer, steps)
    found = again(optimizer)
    assert same(found, optimizer.state_dict())

    other.load_state_dict(again(model))
    resumed = kind(other.parameters(), **PICKY.get(kind.__name__, {}))
    resumed.load_state_dict(found)
    train(model, optimizer, 2)
    train(other, resumed, 2)
    assert same(other.state_dict(), model.state_dict())


SCHEDULERS: dict[str, Any] = {
    "LambdaLR": lambda o: lr.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr.StepLR(o, 2),
    "MultiStepLR": lambda o: lr.MultiStepLR(o, [1, 3, 3]),
    "ConstantLR": lr.ConstantLR,
    "LinearLR": lr.LinearLR,
    "ExponentialLR": lambda o: lr.ExponentialLR(o, 0.9),
    "PolynomialLR": lr.PolynomialLR,
    "CosineAnnealingLR": lambda o: lr.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: lr.OneCycleLR(o, 0.1, total_steps=10),
    "ReduceLROnPlateau": lambda o: lr.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr.SequentialLR(o, [lr.ConstantLR(o), lr.ExponentialLR(o, 0.9)], [2]),
    "ChainedScheduler": lambda o: lr.ChainedScheduler([lr.ConstantLR(o), lr.ExponentialLR(o, 0.9)], o),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05),
}


def test_no_stock_scheduler_is_left_out():
    stock = {name for name in lr.__all__ if name not in ("LRScheduler", "_LRScheduler")}
    assert stock <= {*SCHEDULERS}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_go_on_as_if_nothing_had_happened(same, name):
    def step(optimizer: torch.optim.Optimizer, scheduler: Any) -> list[float]:
        optimizer.step()
        scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()
        return [float(group["lr"]) for group in optimizer.param_groups]

    def fresh() -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1, momentum=0.9)
        return optimizer, SCHEDULERS[name](optimizer)

    optimizer, scheduler = fresh()
    for _ in range(3):
        step(optimizer, scheduler)
    found = again(scheduler)
    assert same(found, scheduler.state_dict())
    other, resumed = fresh()
    other.load_state_dict(again(optimizer))
    resumed.load_state_dict(found)
    assert [step(optimizer, scheduler) for _ in range(4)] == [step(other, resumed) for _ in range(4)]


def test_grad_scaler(same):
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    assert same(again(scaler), scaler.state_dict())
    assert again(scaler)["scale"] == 128.0
    assert again(torch.amp.GradScaler("cpu", enabled=False)) == {}


def test_averaged_model_and_amsgrad_capturable_states(same):
    model = nn.Linear(2, 2)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1), amsgrad=True)
    train(nn.Sequential(nn.Linear(3, 2), model), optimizer, 1)
    assert same(again(averaged), averaged.state_dict())
    assert same(again(optimizer), optimizer.state_dict())
