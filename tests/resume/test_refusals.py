"""States of a module's own (``get_extra_state``), and Statefuls that do not take what they are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from asyncdcp.errors import CorruptCheckpoint, StateMismatch
from asyncdcp.state_dict.flatten import flatten
from asyncdcp.train_state import TrainState


class Extra(nn.Linear):
    """Counts something of its own."""

    def __init__(self, extra: Any) -> None:
        super().__init__(2, 1)
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


_EXTRAS: list[Any] = [
    None,
    {},
    3,
    {"a": torch.ones(2), "n": [torch.zeros(1)]},
    torch.ones(0),
    torch.arange(3),
    {"b": {}},
]


@pytest.mark.parametrize("options", [{}, {"strict": False}, {"keys": ["m*"]}, {"assign": True}], ids=str)
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("stored", _EXTRAS, ids=str)
def test_the_checkpoint_decides_on_the_extra_states_of_modules(into, same, stored, wrapped, options):
    for fresh in _EXTRAS:
        saved, model = Extra(stored), Extra(fresh)
        into({"m": nn.ModuleDict({"module": model}) if wrapped else model}, {"m": saved}, **options)
        assert same(model.extra, stored), fresh
        assert torch.equal(model.weight, saved.weight)


def test_extra_states_of_bare_states_and_train_states_and_alone(into, same):
    filled = {"a": torch.ones(2)}
    for fresh, stored in (({}, filled), (None, filled), (filled, {}), (torch.ones(1), torch.ones(2))):
        bare = into({"m": Extra(fresh).state_dict()}, {"m": Extra(stored).state_dict()})
        assert same(bare["m"]["_extra_state"], stored)
        for wraps in (False, True):
            model, saved = Extra(fresh), Extra(stored)
            wrapped = nn.ModuleDict({"module": saved}) if wraps else saved
            into({"t": TrainState(model)}, {"t": TrainState(wrapped)})
            assert same(model.extra, stored)
        model, saved = Extra(fresh), Extra(stored)
        into({"m": model}, {"m": saved}, keys=["m._extra_state*", "m.bias"])
        assert same(model.extra, stored)
        assert not torch.equal(model.weight, saved.weight)


def test_an_extra_state_that_one_side_lacks_is_a_mismatch(into):
    for target, state in ((Extra(3), nn.Linear(2, 1)), (nn.Linear(2, 1), Extra(3))):
        with pytest.raises(StateMismatch, match=r"m\._extra_state"):
            into({"m": target}, {"m": state})
        into({"m": target}, {"m": state}, strict=False)


class Refusing:
    """A Stateful that fails in its own way."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def state_dict(self) -> dict[str, Any]:
        return {"n": 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise self._error


def test_an_error_of_ours_is_passed_on_with_the_name(into):
    error = CorruptCheckpoint("its own shards are damaged")
    with pytest.raises(CorruptCheckpoint) as caught:
        into({"loader": Refusing(error)}, {"loader": Refusing(error)})
    assert caught.value is error
    assert error.__notes__ == ["raised by the load_state_dict of loader"]


class Unfinished(Refusing):
    def state_dict(self) -> dict[str, Any]:
        raise self._error


def test_an_error_of_a_state_dict_is_raised_with_the_name():
    error = AttributeError("'DataLoader' object has no attribute 'dl_state_dict'")
    with pytest.raises(AttributeError) as caught:
        flatten({"data": [1, Unfinished(error)]})
    assert caught.value is error
    assert error.__notes__ == ["raised by the state_dict of data.1"]


class RefusingExtra(Extra):
    def set_extra_state(self, state: Any) -> None:
        raise state["lost"]


@pytest.mark.parametrize("error", [KeyError("state"), TypeError("no"), RuntimeError("x"), OSError(2, "none")])
def test_a_stateful_that_refuses_is_named(into, error):
    with pytest.raises(StateMismatch, match=r"^loader\.train: its load_state_dict refused") as caught:
        into({"loader": {"train": Refusing(error)}}, {"loader": {"train": Refusing(error)}})
    assert caught.value.__cause__ is error
    assert str(error) in str(caught.value)


def test_a_module_that_fails_in_its_extra_state_is_named(into):
    with pytest.raises(StateMismatch, match=r"^the state: its load_state_dict refused .*KeyError: 'lost'") as caught:
        into(RefusingExtra({}), RefusingExtra({}))
    assert isinstance(caught.value.__cause__, KeyError)
