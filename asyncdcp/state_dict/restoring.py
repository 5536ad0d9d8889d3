"""The end of an in-place load: plain values into containers, and each Stateful's part to its ``load_state_dict``, in
order.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from asyncdcp.errors import AsyncDCPError, StateMismatch
from asyncdcp.state_dict.flatten import FlatState, Taken, is_plain_sequence
from asyncdcp.state_dict.matching import Match, is_within
from asyncdcp.state_dict.nodes import TreeNodes, extra_state_of
from asyncdcp.state_dict.options import LoadOptions
from asyncdcp.state_dict.pruning import prune
from asyncdcp.state_dict.unflatten import unflatten
from asyncdcp.state_dict.values import decode_value
from asyncdcp.stateful import PerRank, Stateful, is_stateful
from asyncdcp.train_state import TrainState

_Place: TypeAlias = tuple[torch.nn.Module, str]
_DICTS = (dict, OrderedDict, defaultdict)


class Restorer:
    """Brings a state to the checkpoint's, once the tensors of ``match`` hold its content.

    ``tensors`` are by the checkpoint's names, aliases too. Containers of the state are kept and changed in place; a
    tuple is made anew only where something in it was.
    """

    def __init__(
        self, flat: FlatState, match: Match, nodes: TreeNodes, values: Mapping[str, Any], options: LoadOptions
    ) -> None:
        self._flat = flat
        self._match = match
        self._nodes = nodes
        self._values = values
        self._options = options
        self._inside = False

    def restore(self, state: Any) -> Any:
        """The state, or what stands for it where it is a tuple or a single value."""
        result = self._value(state, "")
        self._inside = True
        for fqn, taken in self._flat.statefuls.items():
            if not taken.inner:
                self._load(fqn, taken)
        return result

    def _value(self, target: Any, fqn: str) -> Any:
        """What is to stand at ``fqn``: containers as they are, with new content."""
        if isinstance(target, Tensor):
            return self._tensor(target, fqn)
        if isinstance(target, PerRank):
            target.value = self._value(target.value, fqn)
            return target
        if is_stateful(target):
            return target
        if type(target) in _DICTS:  # even where a leaf has its name, as that at "a.b" has in {"a": {"b": {}}, "a.b": 1}
            self._entries(target, fqn)
            if not self._inside:
                self._take_versions(target, fqn)
            return target
        if type(target) in (list, tuple) and not is_plain_sequence(target):
            return self._items(target, fqn)
        source = self._match.sources.get(fqn)
        if source is None or source not in self._values:
            return target
        new = decode_value(self._values[source], fqn, allow_pickle=self._options.allow_pickle)
        if type(target) is list and type(new) is list:
            target[:] = new
            return target
        return new

    def _tensor(self, target: Tensor, fqn: str) -> Any:
        source = self._match.sources.get(fqn)
        if source is None:
            return target
        if source in self._match.tensors:
            return self._match.tensors[source]
        if source in self._values:  # on both sides pickled, for it could not be stored otherwise
            return decode_value(self._values[source], fqn, allow_pickle=self._options.allow_pickle)
        return target

    def _entries(self, target: dict[Any, Any], fqn: str) -> None:
        for key, old in target.items():
            name = f"{fqn}.{key}" if fqn else str(key)
            extra = self._match.extra_states.get(name)
            new = self._value(old, name) if extra is None else self._made(extra)
            if new is not old:
                target[key] = new

    def _take_versions(self, target: dict[Any, Any], fqn: str) -> None:
        """A plain module state is to be given to ``load_state_dict`` by the caller, who needs the checkpoint's
        versions.
        """
        node = self._nodes.get(fqn)
        if isinstance(target, OrderedDict) and node is not None and "metadata" in node:
            vars(target)["_metadata"] = self._nodes.metadata(node)

    def _items(self, target: Any, fqn: str) -> Any:
        merged = [self._value(old, f"{fqn}.{n}" if fqn else str(n)) for n, old in enumerate(target)]
        if all(new is old for new, old in zip(merged, target, strict=True)):
            return target
        if type(target) is list:
            target[:] = merged
            return target
        return tuple(merged)

    def _load(self, fqn: str, taken: Taken) -> None:
        """Gives a Stateful its part; what no name of was selected is left alone."""
        if fqn in self._match.deciding:
            node = self._nodes.get(fqn)
            if node is not None and isinstance(taken.stateful, TrainState):  # the rest of it is other ranks'
                node = prune(node, self._is_here, fqn)
            if node is not None:
                part = self._made(node)
                if isinstance(taken.stateful, TrainState) and self._options.in_part:
                    part = taken.stateful.completed(part, taken.state)
                self._hand_over(fqn, taken.stateful, part, strict=self._options.strict)
            return
        extra = self._match.extra_states
        chosen = [name for name in taken.names if name in self._match.sources or extra_state_of(name) in extra]
        if chosen or not taken.names or any(is_within(name, fqn) for name in extra):
            part = self._value(taken.state, fqn)
            whole = len(chosen) == len(taken.names)
            if not whole and isinstance(part, dict) and isinstance(taken.stateful, torch.nn.Module):
                part = self._only(part, fqn)  # others are given what they had for what is not loaded
            self._hand_over(fqn, taken.stateful, part, strict=whole)

    def _is_here(self, name: str) -> bool:
        empty = name in self._nodes and name in self._nodes.extra_states  # the name of a container: it has no leaf
        return empty or name in self._match.tensors or name in self._values

    def _made(self, node: Any) -> Any:
        return unflatten(node, self._match.tensors, self._values, allow_pickle=self._options.allow_pickle)

    def _only(self, part: dict[Any, Any], fqn: str) -> dict[Any, Any]:
        """The entries of a module's state that are loaded; the others are not even copied onto themselves."""
        loaded = self._match.sources.keys() | self._match.extra_states.keys()
        kept = [key for key in part if (f"{fqn}.{key}" if fqn else str(key)) in loaded]
        few = OrderedDict((key, part[key]) for key in kept)
        if isinstance(part, OrderedDict):
            vars(few).update(vars(part))
        return few

    def _hand_over(self, fqn: str, stateful: Stateful, part: Any, *, strict: bool) -> None:
        """What it raises is told with its name, as a ``StateMismatch`` unless it is an error of ours already."""
        try:
            if isinstance(stateful, torch.nn.Module):
                self._load_module(stateful, part, strict=strict)
            else:
                stateful.load_state_dict(part)
        except AsyncDCPError as error:
            error.add_note(f"raised by the load_state_dict of {fqn or 'the state'}")
            raise
        except Exception as error:
            kind = "" if type(error) is RuntimeError else f"{type(error).__name__}: "
            message = f"{fqn or 'the state'}: its load_state_dict refused the checkpoint's state: {kind}{error}"
            raise StateMismatch(message) from error

    def _load_module(self, module: torch.nn.Module, part: Any, *, strict: bool) -> None:
        ties = _ties(module) if self._options.assign else []
        module.load_state_dict(part, strict=strict, assign=self._options.assign)
        for old, places in ties:
            _tie(old, places)


def _ties(module: torch.nn.Module) -> list[tuple[torch.nn.Parameter, list[_Place]]]:
    """The parameters that stand in several places, each with these."""
    found: dict[torch.nn.Parameter, list[_Place]] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                found.setdefault(parameter, []).append((part, name))
    return [(parameter, places) for parameter, places in found.items() if len(places) > 1]


def _tie(old: torch.nn.Parameter, places: Sequence[_Place]) -> None:
    """Makes one again of what stood for ``old``: ``load_state_dict(assign=True)`` makes a parameter for each place."""
    new = [parameter for part, name in places if (parameter := part._parameters[name]) is not old]
    for part, name in places if new else ():
        part._parameters[name] = new[-1]
