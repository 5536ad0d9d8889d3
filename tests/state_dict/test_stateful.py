"""RNGState, PerRank, and what counts as a Stateful."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from asyncdcp.errors import StateMismatch
from asyncdcp.state_dict.flatten import flatten
from asyncdcp.state_dict.unflatten import unflatten
from asyncdcp.stateful import PerRank, RNGState, Stateful, is_stateful


def draw() -> list[Any]:
    return [torch.rand(3).tolist(), torch.randn(3).tolist(), random.random(), random.gauss(0, 1), np.random.normal()]


def test_all_generators_continue_exactly(same):
    draw()  # leaves half of a pair of normal numbers in the generators that make them in pairs
    flat = flatten({"rng": RNGState()})
    state = RNGState().state_dict()
    tree, values = msgspec.json.decode(msgspec.json.encode([flat.tree, flat.values]))
    expected = [draw() for _ in range(3)]
    assert same(unflatten(tree, flat.tensors, values)["rng"], state)
    target = RNGState()
    for _ in range(2):
        target.load_state_dict(unflatten(tree, flat.tensors, values)["rng"])
        assert [draw() for _ in range(3)] == expected


def test_taking_the_state_moves_no_generator():
    RNGState().load_state_dict(RNGState().state_dict())
    state = RNGState().state_dict()
    first = draw()
    RNGState().load_state_dict(state)
    RNGState().state_dict()
    assert draw() == first


def test_a_state_without_the_generators_is_refused_before_any_is_set():
    before = torch.get_rng_state()
    with pytest.raises(StateMismatch, match="lacks python"):
        RNGState().load_state_dict({"torch": torch.zeros_like(before)})
    assert torch.equal(torch.get_rng_state(), before)


class _Device:
    """Stands for torch.cuda and its like: two devices, the state of each a tensor."""

    def __init__(self) -> None:
        self.states = [torch.tensor([1, 2], dtype=torch.uint8), torch.tensor([3, 4], dtype=torch.uint8)]

    def get_rng_state(self, device: int) -> torch.Tensor:
        return self.states[device].clone()

    def set_rng_state(self, state: torch.Tensor, device: int) -> None:
        self.states[device] = state


@pytest.fixture
def two_devices(monkeypatch):
    device = _Device()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: len(device.states))
    monkeypatch.setattr(torch, "get_device_module", lambda kind: {"cuda": device}[kind])
    return device


def test_every_device_of_the_accelerator(two_devices):
    state = RNGState().state_dict()
    assert list(flatten({"rng": RNGState()}).tensors) == [
        "rng.torch",
        "rng.accelerator.cuda.0",
        "rng.accelerator.cuda.1",
    ]
    two_devices.states = [torch.zeros(2), torch.zeros(2)]
    RNGState().load_state_dict(state)
    assert [found.tolist() for found in two_devices.states] == [[1, 2], [3, 4]]
    two_devices.states = [torch.zeros(2)]
    RNGState().load_state_dict(state)
    assert [found.tolist() for found in two_devices.states] == [[1, 2]]
    RNGState().load_state_dict({**state, "accelerator": {"xpu": [torch.zeros(1)]}})
    assert [found.tolist() for found in two_devices.states] == [[1, 2]]


def test_numpy_is_not_imported_to_look_at_it():
    code = (
        "import sys; sys.modules['numpy'] = None\n"
        "import warnings; warnings.simplefilter('ignore')\n"
        "from asyncdcp.state_dict.flatten import flatten; from asyncdcp.stateful import RNGState\n"
        "flat = flatten({'rng': RNGState(), 'x': {1, 2}})\n"
        "RNGState().load_state_dict(RNGState().state_dict())\n"
        "print(sorted([*flat.tensors, *flat.values]))\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert output.stdout.strip() == "['rng.python', 'rng.torch', 'x']", output.stderr


def test_what_is_a_stateful():
    model = nn.Linear(1, 1)
    assert isinstance(model, Stateful)
    assert isinstance(torch.optim.SGD(model.parameters()), Stateful)
    assert isinstance(RNGState(), Stateful)
    assert not isinstance({}, Stateful)
    assert PerRank(3) == PerRank(3)


class _Wrapper:
    """Passes on all that it is asked for, as wrappers of modules and loaders do."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def test_what_counts_as_stateful_does_not_depend_on_the_python():
    assert is_stateful(_Wrapper(nn.Linear(2, 1))) and is_stateful(nn.Linear(2, 1)) and is_stateful(RNGState())
    for value in (_Wrapper(3), _Wrapper({"state_dict": 1}), nn.Linear, RNGState, {"load_state_dict": 1}, None):
        assert not is_stateful(value)
