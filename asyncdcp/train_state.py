"""TrainState: models and optimizers as one Stateful whose entries are named by the parameters' own names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from asyncdcp.errors import DuplicateName, InvalidOption, StateMismatch

_WRAPPERS = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


class TrainState:
    """Models, or parts of one, and their optimizers. Names are fully qualified and without what wrappers add.

    An optimizer's ``state_dict()`` numbers its parameters, so the same number means something else on each pipeline
    stage, and after parameters were added. Here each state stands under its parameter's name: stages do not collide,
    and a checkpoint loads whatever the division into stages or groups.

        {"model": {name: tensor}, "optimizer": {"state": {name: {key: value}}, "groups": {name: [[option, value]]}}}

    Saving or preparing never steps an optimizer: one that has no state yet has none in the checkpoint. On load the
    state of a fresh optimizer is made anew, sharded as its parameters are. What the checkpoint has for parameters that
    are not here is left to the ranks that have them.

    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> state = asyncdcp.TrainState(model, optimizers=optimizer).state_dict()
    >>> list(state["model"]), list(state["optimizer"]["groups"])
    (['weight', 'bias'], ['weight', 'bias'])
    """

    def __init__(self, *models: nn.Module, optimizers: Optimizer | Sequence[Optimizer] = ()) -> None:
        self.models = models
        self.optimizers = (optimizers,) if isinstance(optimizers, Optimizer) else tuple(optimizers)
        for thing in models:
            if not isinstance(thing, nn.Module):
                raise InvalidOption(f"TrainState takes modules, not a {type(thing).__qualname__}; optimizers= the rest")
        self._known: dict[int, str] = {}

    def state_dict(self) -> dict[str, Any]:
        """Tensors are the models' and optimizers' own."""
        # Not above: it takes a second and a half, which programs without a TrainState need not wait for.
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        self._known = {}  # a model may have got or lost layers since, so that its parameters have other names now
        model: dict[str, Any] = {}
        for part in self.models:
            _add(model, get_model_state_dict(part), "models")
        return {"model": model, "optimizer": self._optimizer_state()}

    def _optimizer_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {}
        groups: dict[str, Any] = {}
        for optimizer in self.optimizers:
            names = self._names(optimizer)
            told = optimizer.state_dict()
            _add(state, {names[number]: entries for number, entries in told["state"].items()}, "optimizers")
            for group in told["param_groups"]:
                options = [[key, value] for key, value in group.items() if key not in ("params", "param_names")]
                _add(groups, {names[number]: options for number in group["params"]}, "optimizers")
        return {"state": state, "groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over the part that belongs to the models and optimizers here. ``StateMismatch`` if a model's is not
        there.
        """
        from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

        model = state_dict.get("model", {})
        names = [list(get_model_state_dict(part)) for part in self.models]
        pairs = pair_names(dict.fromkeys(chain.from_iterable(names)), model)
        missing = [name for own in names for name in own if name not in pairs]
        if missing:
            raise StateMismatch(f"TrainState: the state lacks {', '.join(missing[:5])}", missing=missing)
        for part, own in zip(self.models, names, strict=True):
            set_model_state_dict(part, {name: model[pairs[name]] for name in own})
        stored = state_dict.get("optimizer", {})
        for optimizer in self.optimizers:
            self._load_optimizer(optimizer, stored.get("state", {}), stored.get("groups", {}))

    def _load_optimizer(self, optimizer: Optimizer, state: Mapping[str, Any], groups: Mapping[str, Any]) -> None:
        names = self._names(optimizer)
        told = optimizer.state_dict()
        for group in told["param_groups"]:
            known = next((names[number] for number in group["params"] if names[number] in groups), None)
            if known is not None:
                group.update((key, value) for key, value in groups[known])
        told["state"] = {number: dict(state[name]) for number, name in enumerate(names) if name in state}
        optimizer.load_state_dict(told)

    # ── what a load and a division ask ──

    def decided_by_checkpoint(self, path: str) -> bool:
        """Whether an entry that is not in the state may come from the checkpoint: only states of own parameters."""
        section, _, rest = path.partition(".")
        kind, _, name = rest.partition(".")
        if section != "optimizer" or kind not in ("state", "groups"):
            return False
        return not self._own_names().isdisjoint(_prefixes(name))

    def completed(self, stored: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
        """``stored``, and what ``own`` has of parameters and buffers that it does not know."""
        optimizer = stored.get("optimizer", {})
        groups = optimizer.get("groups", {})
        kept = {name: entries for name, entries in own["optimizer"]["state"].items() if name not in groups}
        model = stored.get("model", {})
        pairs = pair_names(own["model"], model)
        return {
            "model": {name: model[pairs[name]] if name in pairs else ours for name, ours in own["model"].items()},
            "optimizer": {"state": kept | optimizer.get("state", {}), "groups": groups},
        }

    def parameters(self) -> dict[str, Tensor]:
        """The optimizers' parameters, by the path of their states."""
        return {
            f"optimizer.state.{name}": parameter
            for optimizer in self.optimizers
            for name, parameter in zip(self._names(optimizer), _parameters(optimizer), strict=True)
        }

    def _own_names(self) -> set[str]:
        return {name for optimizer in self.optimizers for name in self._names(optimizer)}

    def _names(self, optimizer: Optimizer) -> list[str]:
        """The names of an optimizer's parameters, in the order of their numbers."""
        parameters = _parameters(optimizer)
        if any(id(parameter) not in self._known for parameter in parameters):
            self._known = {id(parameter): name for model in self.models for name, parameter in _named(model)}
        unknown = sum(id(parameter) not in self._known for parameter in parameters)
        if unknown:
            raise InvalidOption(
                f"TrainState: {unknown} parameters of a {type(optimizer).__qualname__} are in none of its models; give "
                "all models whose parameters the optimizers have"
            )
        return [self._known[id(parameter)] for parameter in parameters]


def canonical_name(name: str) -> str:
    """A parameter's name without the steps that wrappers add."""
    return ".".join(step for step in name.split(".") if step not in _WRAPPERS)


def pair_names(own: Collection[str], stored: Collection[str]) -> dict[str, str]:
    """The stored name for each of the state's: equal ones first, then those that are equal without the steps of
    wrappers, if that is one to one.
    """
    rest: dict[str, list[str]] = {}
    for name in stored:
        if name not in own:
            rest.setdefault(canonical_name(name), []).append(name)
    alone: dict[str, list[str]] = {}
    for name in own:
        if rest and name not in stored:
            alone.setdefault(canonical_name(name), []).append(name)
    pairs = {name: name for name in own if name in stored}
    for short, names in alone.items():
        candidates = rest.get(short, ())
        if len(candidates) == len(names) == 1:
            pairs[names[0]] = candidates[0]
    return pairs


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A model's parameters by canonical names; by their own where the model has a step called as a wrapper's is, so
    that two of them would have one.
    """
    named = [(canonical_name(name), name, parameter) for name, parameter in model.named_parameters()]
    counts = Counter(short for short, _, _ in named)
    return ((short if counts[short] == 1 else name, parameter) for short, name, parameter in named)


def _parameters(optimizer: Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _prefixes(name: str) -> Iterable[str]:
    yield name
    for position, letter in enumerate(name):
        if letter == ".":
            yield name[:position]


def _add(table: dict[str, Any], more: Mapping[str, Any], whose: str) -> None:
    """Names are unique over all models, and over all optimizers, of a TrainState."""
    twice = table.keys() & more.keys()
    if twice:
        name = min(twice)
        raise DuplicateName(
            f"TrainState: two of its {whose} have the parameter {name!r}; give each a TrainState of its own",
            tensors=[name],
        )
    table.update(more)
