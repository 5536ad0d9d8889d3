"""Modules in every wrapping, tied, averaged, adapted, on meta; and a data loader in the middle of an epoch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from asyncdcp import MemoryStorage, SyncCheckpointer, TrainState
from tests.conftest import Same
from tests.resume.models import TiedHead, make_model, train


def test_compiled_module_and_its_original_are_the_same_checkpoint(checkpointer: SyncCheckpointer, same: Same) -> None:
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


def test_ddp_wrapped(checkpointer: SyncCheckpointer, same: Same, tmp_path: Path) -> None:
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


def test_checkpoint_wrapped(checkpointer: SyncCheckpointer, same: Same) -> None:
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


def test_ema_copy(checkpointer: SyncCheckpointer, same: Same) -> None:
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


def test_lora_subset(checkpointer: SyncCheckpointer, same: Same) -> None:
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


def test_meta_module_by_assign(checkpointer: SyncCheckpointer, same: Same) -> None:
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


def test_old_versions_of_a_module_are_brought_up_to_date(checkpointer: SyncCheckpointer, same: Same) -> None:
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


def test_a_loader_in_mid_epoch(checkpointer: SyncCheckpointer, same: Same) -> None:
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


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_assign_leaves_tied_parameters_tied(into, device):
    stored = TiedHead()
    with torch.device(device):
        model = TiedHead()
    old = model.head.weight
    into({"m": model}, {"m": stored}, assign=True)
    assert model.head.weight is model.embedding.weight is not old
    assert [name for name, _ in model.named_parameters()] == ["embedding.weight"]
    assert torch.equal(model.head.weight, stored.head.weight)
    if device == "cpu":
        into({"m": model}, {"m": TiedHead()}, assign=True, keys=["m.head.*"])
        assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_fused_optimizer_of_parameters_in_channels_last_goes_on(
    checkpointer: SyncCheckpointer, same: Same, *, wrapped: bool
) -> None:
    """Its kernel reads state and parameter by one stride: of a state that was made contiguous it read the wrong places,
    and training went on with other numbers, silently.
    """

    def made() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        model: Any = nn.Conv2d(3, 4, 2)
        model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        state: Any = {"m": model, "o": optimizer}
        return model, optimizer, {"t": TrainState(model, optimizers=optimizer)} if wrapped else state

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        torch.manual_seed(1)
        optimizer.zero_grad()
        model(torch.randn(2, 3, 4, 4)).square().sum().backward()
        optimizer.step()

    model, optimizer, state = made()
    step(model, optimizer)
    storage = MemoryStorage()
    checkpointer.save(storage, state)
    other, fresh, target = made()
    checkpointer.load(storage, target)
    step(model, optimizer)
    step(other, fresh)
    assert same(dict(other.state_dict()), dict(model.state_dict()))


def test_what_assign_makes_is_laid_out_as_what_it_replaces(into: Any) -> None:
    weight = torch.randn(4, 3, 2, 2)
    target = into({"x": torch.empty_like(weight, memory_format=torch.channels_last)}, {"x": weight}, assign=True)
    assert torch.equal(target["x"], weight) and target["x"].is_contiguous(memory_format=torch.channels_last)
