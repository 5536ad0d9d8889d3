"""Changes during staging: which are seen, and which are known not to be."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from asyncdcp.staging.torn import LARGE_BYTES, WHOLE_BYTES, Witness, versions


def witness(*tensors: Tensor) -> Witness:
    return Witness(tensors, versions(tensors), range(len(tensors)))


def test_nothing_changed() -> None:
    tensors = [torch.randn(10_000), torch.ones(3), torch.randn(50, 40).t(), torch.empty(0), torch.tensor(1)]
    assert witness(*tensors).changed() == []


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda t: t.add_(1),
    "data": lambda t: t.data.add_(1),
    "numpy": lambda t: t.numpy().fill(7),
    "foreach": lambda t: torch._foreach_add_([t], 1.0),
    "copy": lambda t: t.copy_(torch.randn(t.shape)),
}


@pytest.mark.parametrize("size", [1, WHOLE_BYTES // 4, WHOLE_BYTES // 4 + 1, LARGE_BYTES // 4 + 1, 1_000_000])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_all_elements_is_seen(change: str, size: int) -> None:
    tensors = [torch.randn(4), torch.randn(size), torch.randn(4)]
    watching = witness(*tensors)
    CHANGES[change](tensors[1])
    assert watching.changed() == [1]


@pytest.mark.parametrize("form", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_a_step_of_adamw_is_always_seen(form: dict[str, Any]) -> None:
    """fp32 at lr 1e-3: every element of parameters and moments moves, and fused steps count no version."""
    for trial in range(60):
        torch.manual_seed(trial)
        size = (40, 200, 40_000)[trial % 3]  # looked at whole, by two samples, by four
        parameter = torch.nn.Parameter(torch.randn(size))
        optimizer = torch.optim.AdamW([parameter], lr=1e-3, **form)
        parameter.grad = torch.randn(size)
        optimizer.step()
        moments = optimizer.state[parameter]
        watching = witness(parameter.detach(), moments["exp_avg"], moments["exp_avg_sq"])
        optimizer.step()
        assert watching.changed() == [0, 1, 2]


def test_the_statistics_of_a_batch_norm_are_seen() -> None:
    norm = torch.nn.BatchNorm1d(64)
    watching = witness(norm.running_mean, norm.running_var, norm.num_batches_tracked)  # type: ignore[arg-type]  # there
    norm(torch.randn(8, 64))
    assert watching.changed() == [0, 1, 2]


def test_one_element_of_a_large_tensor_written_past_the_versions_is_missed() -> None:
    """The known gap: it is in the documentation, and if it ever closes this test says so."""
    tensor = torch.zeros(1_000_000)
    watching = witness(tensor)
    tensor.numpy()[500_000 + 12_345] = 1
    assert watching.changed() == []


def test_an_inference_tensor_has_no_version_and_is_sampled() -> None:
    with torch.inference_mode():
        tensor = torch.zeros(100)
    watching = witness(tensor)
    with torch.inference_mode():
        tensor.add_(1)
    assert watching.changed() == [0]


def test_a_strided_tensor_is_looked_at_by_version_and_ends() -> None:
    tensor = torch.zeros(100, 100)[:, ::3]
    watching = witness(tensor)
    tensor.add_(1)
    assert watching.changed() == [0]


def test_only_the_chosen_are_watched() -> None:
    tensors = [torch.zeros(3), torch.zeros(3)]
    watching = Witness(tensors, versions(tensors), [1])
    for tensor in tensors:
        tensor.add_(1)
    assert watching.changed() == [1]


def test_what_is_watched_lives_on_after_the_save_has_let_go_of_it() -> None:
    """A save that is left behind lets go of its tensors while a thread may still look at them."""
    tensors = [torch.zeros(100), torch.zeros(100)]
    watching, alive = Witness(tensors, versions(tensors), [0, 1]), [weakref.ref(tensor) for tensor in tensors]
    tensors.pop().add_(1)
    tensors.clear()
    assert all(ref() is not None for ref in alive) and watching.changed() == [1]


def test_many_are_told_apart_by_their_samples_alone() -> None:
    tensors = [torch.zeros(n) for n in (1, 2000, 0, 300, 100_000, 5, 20_000)]
    watching = witness(*tensors)
    for number in (1, 4, 5):
        tensors[number].numpy().fill(1)
    assert watching.changed() == [1, 4, 5]
