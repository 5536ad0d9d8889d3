"""TrainState: models and optimizers by their parameters' names, never stepped, whatever the stages and groups."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from asyncdcp import AsyncCheckpointer, TrainState
from asyncdcp.errors import DuplicateName, InvalidOption, StateMismatch


@pytest.fixture
def checkpointer() -> Iterator[AsyncCheckpointer]:
    with AsyncCheckpointer(process=False) as made:
        yield made


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def step(net: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    torch.manual_seed(7)
    net(torch.randn(5, 3)).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def contents(net: nn.Module, *optimizers: torch.optim.Optimizer) -> list[Any]:
    return [net.state_dict(), *(optimizer.state_dict() for optimizer in optimizers)]


def test_training_goes_on_as_if_nothing_had_been(checkpointer: AsyncCheckpointer, tmp_path: Path, same: Any) -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    step(net, optimizer)
    checkpointer.save(tmp_path / "it", {"train": TrainState(net, optimizers=optimizer)}).result()
    other = model(1)
    fresh = torch.optim.AdamW(other.parameters(), lr=0.9)
    checkpointer.load(tmp_path / "it", {"train": TrainState(other, optimizers=fresh)}).result()
    assert same(contents(other, fresh), contents(net, optimizer))
    step(net, optimizer)
    step(other, fresh)
    assert same(contents(other, fresh), contents(net, optimizer))


def test_no_optimizer_is_stepped_by_saving_or_preparing(checkpointer: AsyncCheckpointer, tmp_path: Path) -> None:
    net = model()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    state = {"train": TrainState(net, optimizers=optimizer)}
    checkpointer.prepare(state).result()
    checkpointer.save(tmp_path / "it", state).result()
    assert not optimizer.state
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    stepped = torch.optim.Adam(net.parameters(), lr=0.5)
    step(net, stepped)
    checkpointer.load(tmp_path / "it", {"train": TrainState(net, optimizers=stepped)}).result()
    assert not stepped.state and stepped.param_groups[0]["lr"] == 0.1


def test_groups_and_optimizers_may_be_divided_otherwise(checkpointer: AsyncCheckpointer, tmp_path: Path) -> None:
    net = model()
    one = torch.optim.AdamW(net.parameters(), lr=0.1)
    step(net, one)
    checkpointer.save(tmp_path / "it", {"train": TrainState(net, optimizers=one)}).result()
    other = model(1)
    two = [torch.optim.AdamW(other[2].parameters(), lr=1.0), torch.optim.AdamW(other[:2].parameters(), lr=1.0)]
    checkpointer.load(tmp_path / "it", {"train": TrainState(other, optimizers=two)}).result()
    for name, parameter in other.named_parameters():
        optimizer = two[0] if name.startswith("2.") else two[1]
        expected = one.state[net.get_parameter(name)]["exp_avg"]
        assert torch.equal(optimizer.state[parameter]["exp_avg"], expected)
        assert optimizer.param_groups[0]["lr"] == 0.1


def test_wrappers_do_not_count(checkpointer: AsyncCheckpointer, tmp_path: Path) -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    step(net, optimizer)
    checkpointer.save(tmp_path / "it", {"train": TrainState(net, optimizers=optimizer)}).result()
    wrapped = nn.ModuleDict({"module": model(1)})
    fresh = torch.optim.SGD(wrapped.parameters(), lr=0.2, momentum=0.9)
    state = TrainState(wrapped, optimizers=fresh)
    assert state._names(fresh) == [name for name, _ in net.named_parameters()]


def test_what_is_missing_is_found_before_anything_is_read(checkpointer: AsyncCheckpointer, tmp_path: Path) -> None:
    net = model()
    checkpointer.save(tmp_path / "it", {"train": TrainState(net[:2])}).result()
    with pytest.raises(StateMismatch, match=r"nothing was read(.|\n)*train\.model\.2\.weight"):
        checkpointer.load(tmp_path / "it", {"train": TrainState(net)}).result()
    checkpointer.save(tmp_path / "more", {"train": TrainState(net)}).result()
    with pytest.raises(StateMismatch, match=r"unexpected(.|\n)*train\.model\.2\.weight"):
        checkpointer.load(tmp_path / "more", {"train": TrainState(net[:2])}).result()


def test_what_cannot_be_named_is_refused() -> None:
    with pytest.raises(DuplicateName, match=r"two of its models have the parameter '0\.bias'"):
        TrainState(model(), model()).state_dict()
    with pytest.raises(InvalidOption, match="6 parameters of a SGD are in none of its models"):
        TrainState(nn.Linear(1, 1), optimizers=torch.optim.SGD(model().parameters())).state_dict()
    with pytest.raises(InvalidOption, match="takes modules, not a SGD"):
        TrainState(torch.optim.SGD(model().parameters()))  # type: ignore[arg-type]  # on purpose


class Inner(nn.Module):
    """Has a submodule that is called as DDP calls what it wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.module = nn.Linear(3, 3, bias=False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.module(x) * self.weight


def test_a_step_that_is_only_called_like_a_wrappers_counts(checkpointer: AsyncCheckpointer, tmp_path: Path) -> None:
    nets = Inner(), Inner()
    optimizers = [torch.optim.AdamW(net.parameters()) for net in nets]
    step(nets[0], optimizers[0])
    checkpointer.save(tmp_path / "it", {"train": TrainState(nets[0], optimizers=optimizers[0])}).result()
    checkpointer.load(tmp_path / "it", {"train": TrainState(nets[1], optimizers=optimizers[1])}).result()
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(optimizers[1].state[other]["exp_avg"], optimizers[0].state[one]["exp_avg"])


def test_names_follow_a_model_that_has_changed() -> None:
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    state = TrainState(net, optimizers=torch.optim.SGD(net[1].parameters(), lr=0.1))
    assert list(state.state_dict()["optimizer"]["groups"]) == ["1.weight"]
    del net[0]
    told = state.state_dict()
    assert list(told["model"]) == list(told["optimizer"]["groups"]) == ["0.weight"]


def test_a_parameter_of_two_optimizers_is_refused_as_such() -> None:
    net = nn.Linear(1, 1)
    twice = [torch.optim.SGD(net.parameters(), lr=0.1) for _ in range(2)]
    with pytest.raises(DuplicateName, match="two of its optimizers have the parameter"):
        TrainState(net, optimizers=twice).state_dict()


def test_without_strict_what_the_checkpoint_lacks_is_left_alone(
    checkpointer: AsyncCheckpointer, tmp_path: Path, same: Any
) -> None:
    old = model()
    first = torch.optim.AdamW(old.parameters(), lr=0.1)
    step(old, first)
    checkpointer.save(tmp_path / "it", {"train": TrainState(old, optimizers=first)}).result()
    for keys in (None, ["train.*"], ["*"]):
        grown = model(1).append(nn.Linear(2, 2))
        optimizer = torch.optim.AdamW([*grown[3].parameters(), *grown[:3].parameters()], lr=0.2)
        step(grown, optimizer)
        before = copy.deepcopy([grown[3].state_dict(), [optimizer.state[each] for each in grown[3].parameters()]])
        with pytest.raises(StateMismatch, match=r"train\.model\.3\.weight"):
            checkpointer.load(tmp_path / "it", {"train": TrainState(grown, optimizers=optimizer)}, keys=keys).result()
        target = {"train": TrainState(grown, optimizers=optimizer)}
        checkpointer.load(tmp_path / "it", target, keys=keys, strict=False).result()
        assert same([grown[3].state_dict(), [optimizer.state[each] for each in grown[3].parameters()]], before)
        assert same([*grown[:3].state_dict().values()], [*old.state_dict().values()])
        assert optimizer.param_groups[0]["lr"] == 0.1
        of_old = [first.state[each] for each in old.parameters()]
        assert same([optimizer.state[each] for each in grown[:3].parameters()], of_old)


class Wrapped(nn.Module):
    """A wrapper of one's own, whose step torch does not take away."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> Any:
        return self.module(x)


@pytest.mark.parametrize("strict", [True, False])
def test_wrappers_of_ones_own_do_not_count(
    checkpointer: AsyncCheckpointer, tmp_path: Path, same: Any, strict: bool
) -> None:
    for number, kinds in enumerate([(Wrapped, None), (None, Wrapped)]):
        nets = [model(seed) for seed in (0, 1)]
        wrapped = [net if kind is None else kind(net) for net, kind in zip(nets, kinds, strict=True)]
        optimizers = [torch.optim.AdamW(net.parameters(), lr=0.1) for net in nets]
        step(nets[0], optimizers[0])
        saved, target = (TrainState(net, optimizers=one) for net, one in zip(wrapped, optimizers, strict=True))
        checkpointer.save(tmp_path / str(number), {"train": saved}).result()
        checkpointer.load(tmp_path / str(number), {"train": target}, strict=strict).result()
        assert same(contents(nets[1], optimizers[1]), contents(nets[0], optimizers[0]))
