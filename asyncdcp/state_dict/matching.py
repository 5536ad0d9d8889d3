"""Which entries of a state a checkpoint can fill; every mismatch is found and listed before a byte is read.

For modules and for bare tensors and values the *state* decides: what it has must be in the checkpoint, and alike. For
other Statefuls (optimizers, schedulers, data loaders) the *checkpoint* decides: tensors that are alike on both sides
are filled in place, all others are made anew, and ``load_state_dict`` takes them over. A module whose checkpoint was
written by another version of its class (``_metadata``) counts among the latter, since only its own ``load_state_dict``
can bring it up to date; so do the extra states of modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from asyncdcp.metadata import Metadata, TensorStorageMetadata
from asyncdcp.pipeline.globs import Globs
from asyncdcp.state_dict.chunks import is_checkpointable, is_dtensor
from asyncdcp.state_dict.flatten import FlatState, Taken
from asyncdcp.state_dict.mismatches import mismatch
from asyncdcp.state_dict.nodes import TreeNodes, compare, extra_state_of
from asyncdcp.state_dict.options import LoadOptions
from asyncdcp.state_dict.parameters import optimizer_parameters, tied_parameters
from asyncdcp.state_dict.pruning import own_leaves
from asyncdcp.state_dict.structure import DTYPE_NAMES
from asyncdcp.state_dict.subclasses import Subclass, cannot_be_made, inner_names, put_together
from asyncdcp.train_state import TrainState, canonical_name, pair_names


@dataclass
class Match:
    """What a load will do. Names are FQNs; "stored" ones are the checkpoint's, tied ones resolved."""

    sources: dict[str, str] = field(default_factory=dict)
    """The checkpoint's name for each of the state's that is loaded."""
    fill: list[tuple[str, Tensor]] = field(default_factory=list)
    """Stored tensors and the targets that they fill in place."""
    fresh: dict[str, torch.device] = field(default_factory=dict)
    """Stored tensors for which new ones are made, and where."""
    alike: dict[str, Tensor] = field(default_factory=dict)
    """For stored tensors of ``fresh``: the tensor whose placement and strides the new one gets."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """By the checkpoint's name, aliases too: the tensor that will hold its content. ``add_fresh`` completes it."""
    ties: dict[str, str] = field(default_factory=dict)
    """The stored name of every checkpoint name that is to get one of ``fresh``."""
    deciding: frozenset[str] = frozenset()
    """FQNs of the Statefuls for which the checkpoint decides."""
    extra_states: dict[str, Any] = field(default_factory=dict)
    """The checkpoint's node for each extra state of the state's modules on which it decides."""
    subclasses: dict[str, Subclass] = field(default_factory=dict)
    """The state's tensor subclasses, by their names in the checkpoint; ``add_fresh`` takes them into ``tensors``."""

    loaded: frozenset[str] = frozenset()
    """The checkpoint's names of all that is loaded, tensors and values."""
    missing: list[str] = field(default_factory=list)
    """The state's names that were asked for and stay as they are, since the checkpoint lacks them."""
    unexpected: list[str] = field(default_factory=list)
    """The checkpoint's names, as the state would have them, that were chosen and have no place in the state."""

    def add_fresh(self, made: Mapping[str, Tensor]) -> None:
        """Takes in the new tensors, by stored name; a subclass of such is made anew, of the target's class."""
        self.tensors.update({name: made[stored] for name, stored in self.ties.items()})
        for name, (target, node) in self.subclasses.items():
            new = any(self.sources[part] in self.ties for part in inner_names(node))
            self.tensors[name] = put_together(target, node, self._content) if new else target

    def _content(self, name: str) -> Tensor:
        return self.tensors[self.sources[name]]


def match(flat: FlatState, metadata: Metadata, nodes: TreeNodes, options: LoadOptions, *, alone: bool = True) -> Match:
    """Pairs the state's entries with the checkpoint's. ``StateMismatch`` lists everything that does not fit.

    A rank that is not ``alone`` finds what it does not expect in ``unexpected`` instead: another may hold it.
    """
    matcher = _Matcher(flat, metadata, nodes, options)
    matcher.alone = alone
    return matcher.run()


def canonical(name: str) -> str:
    """An FQN without the steps that wrappers add."""
    return canonical_name(name)


class _Matcher:
    def __init__(self, flat: FlatState, metadata: Metadata, nodes: TreeNodes, options: LoadOptions) -> None:
        self._flat = flat
        self._metadata = metadata
        self._options = options
        self._nodes = nodes
        self._stored = {name: nodes.state_name(name) for name in (*metadata.state_dict_metadata, *metadata.aliases)}
        self._have: dict[str, str] = {}
        self._clashes: dict[str, str] = {}
        for name, own in self._stored.items():
            if options.selects(nodes.outer(name)):
                first = self._have.setdefault(own, name)
                if self._origin(first) != self._origin(name):
                    self._clashes[own] = f"rename gives this name to {first} and to {name}"
        self._inner = {name for part in flat.subclasses.values() for name in inner_names(part.node)}
        self._aliased = {alias: flat.tensors[name] for alias, name in flat.aliases.items()}
        self._ties = bool(flat.aliases or metadata.aliases)
        self._targets: dict[str, Tensor] = {**flat.tensors, **self._aliased}
        self._want = dict.fromkeys([*self._targets, *flat.values])
        self._match = Match(
            deciding=frozenset(
                fqn
                for fqn, taken in flat.statefuls.items()
                if not self._state_decides(fqn, taken) and self._is_chosen(fqn)
            )
        )
        self._extra_states = self._match_extra_states()
        self.alone = True
        self._different: dict[str, str] = {}
        self._subclass_pairs: dict[str, str] = {}

    def run(self) -> Match:
        self._pair()
        told = self._compare_subclasses()
        self._find_gaps(told)
        filled: dict[int, int] = {}
        for name, source in self._match.sources.items():
            if name in self._targets:
                self._target(name, source, filled)
            elif self._is_tensor(source) and not self._decided_by_checkpoint(name):
                self._different[name] = "a plain value in the state, a tensor in the checkpoint"
        strict = self._options.strict
        missing, unexpected = (self._match.missing, self._match.unexpected) if strict else ([], [])
        if missing or self._different or (unexpected and self.alone):
            path, given = self._metadata.storage_meta.checkpoint_id, self._options.given
            raise mismatch(path, missing, unexpected, self._different, options=given)
        self._refuse_new_subclasses()
        self._match.sources.update(self._subclass_pairs)
        self._add_fresh()
        return self._match

    def _compare_subclasses(self) -> set[str]:
        """Pairs tensor subclasses. The names, of either side, of what is part of those that differ."""
        found = compare(self._flat, self._nodes, self._have, self._match.sources)
        self._subclass_pairs = found.pairs
        self._match.subclasses = {stored: self._flat.subclasses[fqn] for fqn, stored in found.pairs.items()}
        for name in found.unpaired:
            self._match.sources.pop(name, None)
        for fqn, problem in found.problems.items():
            if not self._decided_by_checkpoint(fqn):
                self._different[fqn] = problem
        return found.told

    def _refuse_new_subclasses(self) -> None:
        for stored, node in self._nodes.subclasses.items():
            if stored not in self._match.subclasses and self._decided_by_checkpoint(self._nodes.state_name(stored)):
                raise cannot_be_made(node)

    def _state_decides(self, fqn: str, taken: Taken) -> bool:
        if not isinstance(taken.stateful, torch.nn.Module):
            return False
        stored = self._nodes.versions(fqn)
        own = vars(taken.state).get("_metadata") if hasattr(taken.state, "__dict__") else None
        return stored is None or own is None or not _differ(own, stored)

    def _is_chosen(self, fqn: str) -> bool:
        """Whether ``keys`` choose all that the checkpoint has of a Stateful."""
        if self._options.keys is None:
            return True
        names = [name for name, own in self._stored.items() if is_within(own, fqn)]
        if not names:  # an empty state
            return fqn in self._nodes and (self._options.selects(fqn) or self._options.selects(f"{fqn}."))
        return all(self._options.selects(self._nodes.outer(name)) for name in names)

    def _decided_by_checkpoint(self, name: str) -> bool:
        return self._owner(name) is not None or extra_state_of(name) in self._extra_states

    def _match_extra_states(self) -> set[str]:
        """Finds the extra states on which the checkpoint decides. Their names, on either side."""
        stored = self._nodes.extra_states
        own = TreeNodes(self._flat.tree, str).extra_states if stored else {}
        pairs = {name: other for name, other in pair_names(own, stored).items() if self._is_chosen(other)}
        self._match.extra_states = {name: stored[other] for name, other in pairs.items()}
        return {*pairs, *pairs.values()}

    def _owner(self, name: str) -> str | None:
        """The Stateful with the checkpoint's say to whose part ``name`` belongs, whichever side has it."""
        for fqn in self._match.deciding:
            taken = self._flat.statefuls[fqn]
            if name in taken.names or (name not in self._want and is_within(name, fqn)):
                known = taken.stateful
                if isinstance(known, TrainState) and not known.decided_by_checkpoint(
                    name[len(fqn) + 1 if fqn else 0 :]
                ):
                    continue
                return fqn
        return None

    def _pair(self) -> None:
        pairs = pair_names(self._want, self._have)
        self._match.sources.update((name, self._have[other]) for name, other in pairs.items())

    def _find_gaps(self, told: set[str]) -> None:
        """What one side lacks; names that were ``told`` of already are left out."""
        options, sources = self._options, self._match.sources
        for name, clash in self._clashes.items():
            if name in self._want or self._decided_by_checkpoint(name):
                self._different[name] = clash
        if options.keys is not None and (idle := self._idle(options.keys)) and (options.strict or not self._have):
            self._different[", ".join(idle)] = "keys that match nothing in the checkpoint"
        kept = own_leaves(self._flat.tree) if options.per_rank == "drop" else set()
        for name in self._unfilled():
            if name not in told and name not in kept and not self._decided_by_checkpoint(name):
                self._match.missing.append(name)
        for fqn in self._match.deciding:
            names = self._flat.statefuls[fqn].names
            if fqn not in self._nodes and not (names and names <= kept):
                self._match.missing.append(fqn)
        paired = set(sources.values())
        left = (name for name, source in self._have.items() if source not in paired and name not in told)
        self._match.unexpected = [name for name in left if not self._decided_by_checkpoint(name)]

    def _unfilled(self) -> Iterator[str]:
        """The state's names that were asked for and are not paired; a tied tensor is filled under any of its names."""
        options = self._options
        ties = tied_parameters(self._flat) if options.assign else self._flat.aliases
        filled = {ties.get(name, name) for name in self._match.sources}
        outer = {part: fqn for fqn, (_, node) in self._flat.subclasses.items() for part in inner_names(node)}
        for name in self._want:
            if ties.get(name, name) not in filled and options.asks_for(outer.get(name, name)):
                yield name

    def _idle(self, keys: Sequence[str]) -> list[str]:
        """Those of ``keys`` that nothing is named like: on neither side, nor a Stateful whose state is empty."""
        if not self._have:
            return list(keys)
        chosen = dict.fromkeys(self._nodes.outer(name) for name in self._have.values())
        empty = [fqn for fqn, taken in self._flat.statefuls.items() if not taken.names]
        names = [*chosen, *self._want, *empty, *(f"{fqn}." for fqn in empty)]
        return Globs(keys).idle(names)

    def _target(self, name: str, source: str, filled: dict[int, int]) -> None:
        """Decides what becomes of one of the state's tensors. A tied one is filled once: where the checkpoint has
        several for it, from that of its last name, as ``Module.load_state_dict`` would leave it. Where the checkpoint
        decides, it is not tied any more.
        """
        tensor, stored = self._targets[name], self._origin(source)
        problem = self._difference(name, tensor, stored)
        if problem is None and not self._options.assign and not tensor.is_meta:
            fill = self._match.fill
            place = filled.setdefault(id(tensor), len(fill)) if self._ties else len(fill)
            if place < len(fill) and fill[place][0] != stored and self._decided_by_checkpoint(name):
                return
            self._match.tensors[source] = tensor
            fill[place : place + 1] = [(stored, tensor)]
        elif problem is not None and not self._decided_by_checkpoint(name):
            self._different[name] = problem

    def _difference(self, name: str, tensor: Tensor, stored: str) -> str | None:
        entry = self._metadata.state_dict_metadata[stored]
        if not isinstance(entry, TensorStorageMetadata):
            return "a tensor in the state, a plain value in the checkpoint"
        if not self._options.assign and shares_memory(tensor):
            way_out = ", or assign=True" if self._options.given else ""
            return f"some of its elements in the state share memory, as after expand(): clone() it{way_out}"
        dtype, shape = DTYPE_NAMES.get(tensor.dtype), tuple(tensor.shape)
        if shape != entry.size:
            return f"shape {list(shape)} in the state, {list(entry.size)} in the checkpoint"
        assign = self._options.assign
        if assign and name not in self._inner:  # a subclass's context speaks of its inner tensors' dtypes
            return None
        if tensor.is_meta and not assign:
            way_out = ", or load with assign=True" if self._options.given else ""
            return f"on the meta device: call to_empty() on the module first{way_out}"
        if dtype != entry.properties.dtype and (assign or self._options.cast == "error"):
            way_out = " (cast='allow' converts)" if self._options.given and not assign else ""
            return f"dtype {dtype} in the state, {entry.properties.dtype} in the checkpoint{way_out}"
        return None

    def _add_fresh(self) -> None:
        """New tensors for all that is loaded and has no target: parts of Statefuls, and everything with ``assign``.
        They are where their predecessors are, those of an optimizer's state where its parameters are.
        """
        wanted = set(self._match.sources.values())
        wanted |= {source for name, source in self._have.items() if self._decided_by_checkpoint(name)}
        self._match.loaded = frozenset(wanted)
        sources = self._match.sources
        models = {sources[name]: tensor for name, tensor in self._targets.items() if name in sources}
        parameters = optimizer_parameters(self._flat)
        for own, name in self._have.items():
            if name in wanted and name not in self._match.tensors and self._is_tensor(name):
                model = models.get(name)
                device = self._options.device if model is None else model.device
                stored = self._match.ties[name] = self._origin(name)
                self._match.fresh[stored] = self._options.device if device.type == "meta" else device
                self._place(stored, model if model is not None else parameters.get(own.rpartition(".")[0]))

    def _place(self, stored: str, model: Tensor | None) -> None:
        """Has the new tensor placed as ``model``, if that is sharded, and laid out in memory as that: a fused optimizer
        takes it for granted that its state is laid out as its parameters are.
        """
        entry = self._metadata.state_dict_metadata[stored]
        assert isinstance(entry, TensorStorageMetadata)
        if model is None or tuple(model.shape) != entry.size:
            return
        if is_dtensor(model):
            self._match.alike[stored] = model
            self._match.fresh[stored] = model.device
        elif not model.is_contiguous() and not is_checkpointable(model):
            self._match.alike[stored] = model

    def _origin(self, name: str) -> str:
        return self._metadata.aliases.get(name, name)

    def _is_tensor(self, name: str) -> bool:
        return isinstance(self._metadata.state_dict_metadata[self._origin(name)], TensorStorageMetadata)


def is_within(name: str, fqn: str) -> bool:
    """Whether a name is that of what stands at ``fqn``, or of something in it."""
    return not fqn or name == fqn or name.startswith(f"{fqn}.")


def shares_memory(tensor: Tensor) -> bool:
    """Whether elements may have one place in memory, so that they cannot be filled."""
    if tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _differ(own: Mapping[str, Any], stored: Mapping[str, Any]) -> bool:
    """Whether a submodule that both sides have is of another version of its class."""
    ours, theirs = _versions(own), _versions(stored)
    return any(ours[name] != theirs[name] for name in ours.keys() & theirs.keys())


def _versions(metadata: Mapping[str, Any]) -> dict[str, object]:
    """By canonical name, so that of a wrapper and what it wraps the inner one counts."""
    return {canonical(name): entry.get("version") for name, entry in metadata.items() if isinstance(entry, Mapping)}
