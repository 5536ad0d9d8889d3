"""Guards and eager copies, by themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from asyncdcp.errors import InvalidOption, UsageError
from asyncdcp.staging import stager
from asyncdcp.staging.guard import EagerBudget, Guard, clone_unguarded, frozen_parameters


def stepped(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer


def test_every_step_waits_until_the_guard_is_removed() -> None:
    waits: list[int] = []
    optimizers = [stepped(nn.Linear(2, 2)) for _ in range(2)]
    guard = Guard(tuple(optimizers), lambda: waits.append(1))
    for optimizer in optimizers:
        optimizer.step()
    assert len(waits) == 2
    assert guard.active
    guard.remove()
    guard.remove()
    optimizers[0].step()
    assert len(waits) == 2
    assert not guard.active


def test_a_guard_is_a_context_manager() -> None:
    waits: list[int] = []
    optimizer = stepped(nn.Linear(2, 2))
    with Guard((optimizer,), lambda: waits.append(1)):
        optimizer.step()
    optimizer.step()
    assert waits == [1]


def test_optimizers_in_the_backward_pass_wait_there() -> None:
    model, waits = nn.Linear(2, 2), []
    optimizers = {parameter: torch.optim.SGD([parameter], lr=0.1) for parameter in model.parameters()}
    with Guard(tuple(optimizers.values()), lambda: waits.append(1)):
        for parameter, optimizer in optimizers.items():
            parameter.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
        model(torch.ones(1, 2)).sum().backward()
    assert len(waits) == 2


def test_what_has_no_hook_is_refused_by_type() -> None:
    with pytest.raises(InvalidOption, match=r"builtins\.object.*register_step_pre_hook"):
        Guard((object(),), lambda: None)


class Wrapper(torch.optim.Optimizer):
    """As accelerate's: an optimizer by its class, which holds the one that steps and leaves out ``__init__``."""

    def __init__(self, optimizer: torch.optim.Optimizer | None) -> None:
        self.optimizer = optimizer

    def step(self) -> None:  # type: ignore[override]  # no closure
        assert self.optimizer is not None
        self.optimizer.step()


def test_what_a_wrapper_without_hooks_has_inside_is_held_back() -> None:
    waits: list[int] = []
    model = nn.Linear(2, 2)
    wrapper = Wrapper(Wrapper(stepped(model)))
    with Guard((wrapper,), lambda: waits.append(1)) as guard:
        wrapper.step()
        assert model.weight.data_ptr() in {tensor.data_ptr() for tensor in guard.tensors()}
    wrapper.step()
    assert waits == [1]
    with pytest.raises(InvalidOption, match=r"Wrapper: it has no register_step_pre_hook"):
        Guard((Wrapper(None),), lambda: None)


def test_a_guard_knows_parameters_and_states() -> None:
    model = nn.Linear(2, 2)
    optimizer = stepped(model)
    guard = Guard((optimizer,), lambda: None)
    pointers = {tensor.data_ptr() for tensor in guard.tensors()}
    assert {parameter.data_ptr() for parameter in model.parameters()} <= pointers
    assert {state["exp_avg"].data_ptr() for state in optimizer.state.values()} <= pointers
    guard.remove()


def test_what_is_not_guarded_is_cloned_up_to_the_budget_smallest_first() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].weight.requires_grad = False
    guard = Guard((torch.optim.SGD([p for p in model.parameters() if p.requires_grad]),), lambda: None)
    names, tensors = zip(*model.state_dict().items(), strict=True)
    large = torch.zeros(1000)
    found = [*tensors, large]
    budget = EagerBudget(100)
    exposed, taken = clone_unguarded(found, [*guard.tensors(), *frozen_parameters(iter([model]))], budget)
    copied = [name for name, before, after in zip(names, tensors, found, strict=False) if before is not after]
    assert copied == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert exposed == {len(found) - 1}
    assert found[-1] is large
    assert taken == budget.used == 8 + 8 + 8
    budget.give(taken)
    assert budget.used == 0
    guard.remove()


@pytest.mark.parametrize("fails", ["the clone", "the fence", "the versions"])
def test_a_save_that_is_refused_gives_the_budget_back(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise UsageError("refused")

    guard, budget = Guard((stepped(nn.Linear(2, 2)),), lambda: None), EagerBudget(100)
    owners = {"the clone": (torch.Tensor, "clone"), "the fence": (stager, "DeviceFence")}
    monkeypatch.setattr(*owners.get(fails, (stager, "versions")), fail)
    with pytest.raises(UsageError):
        stager.Sources([torch.ones(3)], [guard], [], budget)
    assert budget.used == 0
    guard.remove()


def test_parameters_without_gradient_are_not_cloned_but_watched() -> None:
    average = nn.Linear(2, 2).requires_grad_(False)
    guard, model = Guard((stepped(nn.Linear(2, 2)),), lambda: None), nn.Linear(2, 2)
    found = stager.Sources([model.weight, average.weight], [guard], [average], EagerBudget(100))
    assert found.tensors[1] is average.weight
    changed = found.witness()
    assert changed() == []
    average.weight.lerp_(torch.ones(2, 2), 0.5)  # as an average of weights, or a target network, is updated
    assert changed() == [1]
    guard.remove()


def test_a_guard_knows_the_inner_tensors_of_subclasses() -> None:
    first, second = torch.ones(2), torch.zeros(2)
    parameter = nn.Parameter(TwoTensor(first, second))
    guard = Guard((torch.optim.SGD([parameter]),), lambda: None)
    assert [tensor.data_ptr() for tensor in guard.tensors()] == [first.data_ptr(), second.data_ptr()]
    guard.remove()
