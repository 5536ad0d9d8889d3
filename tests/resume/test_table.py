"""Resume equals no interruption: every stock optimizer, scheduler and kind of module, saved and loaded in the middle of
training.

Each case trains a few steps, saves, goes on; then a second program loads and goes on from there. Parameters, states and
losses must be equal bit for bit.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from asyncdcp import MemoryStorage, RNGState, SyncCheckpointer

OPTIMIZERS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
)


def make_model() -> Any:  # an nn.Sequential; Any, since its parts are taken by number
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 2))


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


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.fixture
def checkpointer():
    with SyncCheckpointer() as made:
        yield made


@pytest.mark.parametrize("target", ["fresh", "stepped"])
@pytest.mark.parametrize("saved", ["fresh", "stepped", "partly frozen"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer(name: str, saved: str, target: str, checkpointer: SyncCheckpointer) -> None:
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


def train(model: Any, count: int = 2) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()


def test_compiled_module_and_its_original_are_the_same_checkpoint(checkpointer: SyncCheckpointer) -> None:
    model = make_model()
    compiled = torch.compile(model, backend="eager")
    train(model)
    pairs: list[tuple[Any, Any]] = [(compiled, make_model()), (model, torch.compile(make_model(), backend="eager"))]
    for saved, target in pairs:
        storage = MemoryStorage()
        checkpointer.save(storage, {"model": saved})
        train(target, 0)
        checkpointer.load(storage, {"model": target})
        assert same(list(model.state_dict().values()), list(target.state_dict().values()))


def test_ddp_wrapped(checkpointer: SyncCheckpointer, tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = make_model()
        wrapped = nn.parallel.DistributedDataParallel(model)
        train(model)
        for saved, target in ((wrapped, make_model()), (model, nn.parallel.DistributedDataParallel(make_model()))):
            for as_dict in (False, True):
                storage = MemoryStorage()
                checkpointer.save(storage, {"model": saved.state_dict() if as_dict else saved})
                checkpointer.load(storage, {"model": target})
                assert same(list(model.state_dict().values()), list(target.state_dict().values()))
    finally:
        torch.distributed.destroy_process_group()


def test_checkpoint_wrapped(checkpointer: SyncCheckpointer) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = make_model()
    storage = MemoryStorage()
    checkpointer.save(storage, {"model": model})
    other = make_model()
    train(other)
    other[0] = checkpoint_wrapper(other[0])
    checkpointer.load(storage, {"model": other})
    assert same(list(model.state_dict().values()), list(other.state_dict().values()))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_embeddings_stay_tied(checkpointer: SyncCheckpointer) -> None:
    model = Tied()
    storage = MemoryStorage()
    result = checkpointer.save(storage, {"model": model})
    assert result.tensors == 1
    other = Tied()
    checkpointer.load(storage, {"model": other})
    assert other.head.weight is other.embedding.weight
    assert torch.equal(other.head.weight, model.head.weight)
    fresh = checkpointer.load(storage)
    assert fresh["model"]["head.weight"] is fresh["model"]["embedding.weight"]
    untied = Tied()
    untied.head = nn.Linear(5, 7, bias=False)
    checkpointer.load(storage, {"model": untied})
    assert torch.equal(untied.head.weight, model.head.weight)
    assert torch.equal(untied.embedding.weight, model.head.weight)


def test_ema_copy(checkpointer: SyncCheckpointer) -> None:
    model = make_model()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    train(model)
    averaged.update_parameters(model)
    storage = MemoryStorage()
    checkpointer.save(storage, {"model": model, "ema": averaged})
    other = make_model()
    its_average = torch.optim.swa_utils.AveragedModel(other)
    checkpointer.load(storage, {"model": other, "ema": its_average})
    assert same(dict(averaged.state_dict()), dict(its_average.state_dict()))


def test_lora_subset(checkpointer: SyncCheckpointer) -> None:
    class Lora(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(4, 4)
            self.lora_a = nn.Linear(4, 2, bias=False)
            self.lora_b = nn.Linear(2, 4, bias=False)

    model, other = Lora(), Lora()
    before = copy.deepcopy(other.base.state_dict())
    storage = MemoryStorage()
    checkpointer.save(storage, {"model": model})
    checkpointer.load(storage, {"model": other}, keys=["*lora_*"])
    assert torch.equal(other.lora_a.weight, model.lora_a.weight)
    assert torch.equal(other.lora_b.weight, model.lora_b.weight)
    assert same(dict(other.base.state_dict()), dict(before))


def test_meta_module_by_assign(checkpointer: SyncCheckpointer) -> None:
    from asyncdcp.errors import StateMismatch

    model = make_model()
    storage = MemoryStorage()
    checkpointer.save(storage, {"model": model})
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(StateMismatch, match="to_empty"):
        checkpointer.load(storage, {"model": empty})
    checkpointer.load(storage, {"model": empty}, assign=True)
    assert same(dict(model.state_dict()), dict(empty.state_dict()))


def test_old_versions_of_a_module_are_brought_up_to_date(checkpointer: SyncCheckpointer) -> None:
    """BatchNorm's version 2 added num_batches_tracked; its own load_state_dict knows what to do without."""
    model = make_model()
    old: Any = model.state_dict()
    del old["1.num_batches_tracked"]
    old._metadata["1"]["version"] = 1
    storage = MemoryStorage()
    checkpointer.save(storage, {"model": old})
    other = make_model()
    train(other)
    reference = copy.deepcopy(other)
    reference.load_state_dict(old)  # what torch makes of it
    checkpointer.load(storage, {"model": other})
    assert same(dict(reference.state_dict()), dict(other.state_dict()))
    assert torch.equal(other[1].running_mean, model[1].running_mean)


def test_a_hook_that_clones_is_no_silent_no_op(checkpointer: SyncCheckpointer) -> None:
    model, other = make_model(), make_model()
    train(model)
    other.register_state_dict_post_hook(
        lambda module, state, prefix, extra: state.update({k: v.clone() for k, v in state.items()})
    )
    storage = MemoryStorage()
    checkpointer.save(storage, {"model": model})
    checkpointer.load(storage, {"model": other})
    assert torch.equal(other[0].weight, model[0].weight)


class Loader:
    """A data loader in the middle of an epoch, as torchdata's: nested dicts, different by position."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def test_a_loader_in_mid_epoch(checkpointer: SyncCheckpointer) -> None:
    loader = Loader()
    loader.state = {
        "epoch": 1,
        "order": torch.randperm(10),
        "workers": [{"offset": 3, "buffer": [torch.ones(2)]}, None],
    }
    storage = MemoryStorage()
    checkpointer.save(storage, {"loader": loader})
    other = Loader()
    checkpointer.load(storage, {"loader": other})
    assert same(other.state, loader.state)
    other.state = {"order": torch.zeros(10, dtype=torch.int64), "gone": 1}
    kept = other.state["order"]
    checkpointer.load(storage, {"loader": other})
    assert same(other.state, loader.state)
    assert other.state["order"] is kept  # filled in place
