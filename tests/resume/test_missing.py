"""What a state has and a checkpoint lacks: an error where the load is strict, told in its report where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from asyncdcp import AsyncCheckpointer, LoadReport, MemoryStorage
from asyncdcp.errors import StateMismatch
from asyncdcp.pipeline.globs import Globs
from asyncdcp.state_dict import options as load_options
from asyncdcp.state_dict.options import LoadOptions, with_prefix
from tests.resume.models import TiedHead


@pytest.fixture
def reported() -> Any:
    """Saves one state, loads it into another, and gives the load's report."""
    with AsyncCheckpointer(process=False) as checkpointer:

        def load(target: Any, state: Any, **options: Any) -> LoadReport:
            storage = MemoryStorage()
            checkpointer.save(storage, state).result()
            future = checkpointer.load(storage, target, **options)
            future.result()
            assert isinstance(future.report, LoadReport)
            return future.report

        yield load


def nets(*, head: bool = False) -> dict[str, Any]:
    layers = {"body": nn.Linear(2, 2), **({"head": nn.Linear(2, 1)} if head else {})}
    return {"model": nn.ModuleDict(layers), "step": 1}


RENAMED: list[Any] = [
    ({"keys": ["model.*"]}, "model"),
    ({"keys": ["*.head.*", "model.body.*"]}, "model"),
    ({"keys": ["model.*"]}, "model._orig_mod"),
    ({"keys": ["model.*"], "rename": {"model": "net"}}, "net"),
    ({"keys": ["*head.*", "*body*"], "rename": {"model": "a", "model.head": "b.head", "model.body": "a.body"}}, "b"),
]


@pytest.mark.parametrize(("options", "fqn"), RENAMED)
def test_what_keys_choose_must_be_there(reported: Callable[..., LoadReport], options: Any, fqn: str) -> None:
    """It was left as it was, and nothing said so: a model with a head that was never trained."""
    target = {f"{fqn}.{name}": tensor for name, tensor in nets(head=True)["model"].state_dict().items()}
    if fqn == "b":
        target = {name.replace("b.body", "a.body"): tensor for name, tensor in target.items()}
    missing = (f"{fqn}.head.weight", f"{fqn}.head.bias")
    with pytest.raises(StateMismatch, match="missing in the checkpoint: 2") as caught:
        reported(target, nets(), **{**options, "keys": [*options["keys"], "*body.bias"]})
    assert caught.value.missing == missing
    report = reported(target, nets(), **options, strict=False)
    assert (report.missing, report.unexpected) == (missing, ())


def test_what_keys_do_not_choose_is_not_missed(reported: Callable[..., LoadReport]) -> None:
    target = {**nets(head=True), "epoch": 5}
    assert reported(target, nets(), keys=["model.body.*"]).missing == ()
    assert reported(target, nets(), keys=["model.*"], rename=lambda name: name, strict=False).missing == ()


def test_an_optimizer_without_state_misses_nothing(reported: Callable[..., LoadReport]) -> None:
    net = nn.Linear(2, 1)
    stepped, fresh = (torch.optim.AdamW(net.parameters()) for _ in range(2))
    net(torch.ones(1, 2)).sum().backward()
    stepped.step()
    assert reported({"o": stepped}, {"o": fresh}, keys=["o.*"]).missing == ()
    assert stepped.state_dict()["state"] == {}


def test_both_sides_are_told_without_strict(reported: Callable[..., LoadReport]) -> None:
    report = reported({"a": 1, "b": {"x": 1}}, {"b": {"x": 2, "y": 3}, "c": torch.ones(1)}, strict=False)
    assert (report.missing, sorted(report.unexpected)) == (("a",), ["b.y", "c"])
    assert reported({"o": torch.optim.SGD(nn.Linear(1, 1).parameters())}, {}, strict=False).missing == ("o",)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_tied_tensor_is_filled_under_any_of_its_names(reported: Callable[..., LoadReport], device: str) -> None:
    """As from a Hugging Face folder, where each tensor has one name."""
    with torch.device(device):
        model = TiedHead()
    weight = torch.randn(3, 2)
    assert reported({"m": model}, {"m.head.weight": weight}, assign=device == "meta").missing == ()
    assert torch.equal(model.embedding.weight, weight)
    assert model.head.weight is model.embedding.weight
    tied = {"a": weight, "b": weight}
    with pytest.raises(StateMismatch, match="missing") as caught:  # what is replaced is not tied any more
        reported(tied, {"a": weight}, assign=True)
    assert caught.value.missing == ("b",)


def test_names_are_not_compared_with_all_that_rename_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of twenty thousand each, that took a quarter of an hour."""
    made = Mock(side_effect=with_prefix)
    monkeypatch.setattr(load_options, "with_prefix", made)
    chosen = LoadOptions(keys=["b.7.*"], rename={f"b.{number}": f"a.{number}" for number in range(100)})
    assert [number for number in range(100) if chosen.asks_for(f"a.{number}.w")] == [7]
    assert made.call_count <= 300


def test_keys_that_are_no_globs_are_looked_up() -> None:
    globs = Globs(["a.b", "c.*", "d[0]", "e?"])
    assert [name for name in ("a.b", "a.b.c", "axb", "c.d.e", "d0", "d[0]", "e", "e1", "") if globs.match(name)] == [
        *("a.b", "c.d.e", "d0", "e1")
    ]
    assert globs.idle(["a.b.c", "c.", "d[0]", "e1"]) == ["a.b", "d[0]"]
    assert not Globs(["a"]).match("")
