"""How a load matches a state with a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch

from asyncdcp.config import check_flags
from asyncdcp.errors import InvalidOption
from asyncdcp.pipeline.globs import Globs
from asyncdcp.train_state import canonical_name


@dataclass(frozen=True)
class LoadOptions:
    """See ``AsyncCheckpointer.load`` for what each means."""

    strict: bool = True
    cast: Literal["error", "allow"] = "error"
    keys: Sequence[str] | None = None
    rename: Mapping[str, str] | Callable[[str], str] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    assign: bool = False
    allow_pickle: bool = False
    per_rank: Literal["error", "rank0", "drop"] = "error"
    replicas: Literal["read", "broadcast"] = "read"
    given: bool = True
    """Whether the caller can give these options: else errors do not name them as ways out."""

    def __post_init__(self) -> None:
        if self.cast not in ("error", "allow"):
            raise InvalidOption(f"cast takes 'error' or 'allow', not {self.cast!r}")
        if self.per_rank not in ("error", "rank0", "drop"):
            raise InvalidOption(f"per_rank takes 'error', 'rank0' or 'drop', not {self.per_rank!r}")
        if self.replicas not in ("read", "broadcast"):
            raise InvalidOption(f"replicas takes 'read' or 'broadcast', not {self.replicas!r}")
        check_flags(strict=self.strict, assign=self.assign, allow_pickle=self.allow_pickle)
        check_keys(self.keys)
        if not (self.rename is None or callable(self.rename) or is_renaming(self.rename)):
            raise InvalidOption(
                "rename takes a mapping of the checkpoint's names to the state's, such as {'net': 'model'}, or a "
                f"function, not {self.rename!r:.80}"
            )

    @property
    def in_part(self) -> bool:
        """Whether what the checkpoint lacks, or is not chosen of it, is to be left alone."""
        return not self.strict or self.keys is not None

    def selects(self, name: str) -> bool:
        """Whether ``keys`` lets a checkpoint's FQN through."""
        return self._globs is None or self._globs.match(name)

    def asks_for(self, name: str) -> bool:
        """Whether ``keys`` choose what the checkpoint would have for the state's FQN ``name``, as far as that can be
        told: a function for ``rename`` cannot be followed back.
        """
        if self.keys is None:
            return True
        if callable(self.rename):
            return False
        names = {name, canonical_name(name)}
        stored = {
            with_prefix(own, new, old)
            for own in names
            for new in prefixes_of(own)
            for old in self._renamed_to.get(new, ())
        }
        return any(self.selects(known) and self.renamed(known) in names for known in names | stored)

    def renamed(self, name: str) -> str:
        """The state's name for a checkpoint's FQN. A mapping's keys are FQNs, or prefixes of them up to a dot, of which
        the longest counts; "" stands for all.
        """
        if self.rename is None:
            return name
        if callable(self.rename):
            new: object = self.rename(name)
            if not isinstance(new, str):
                raise InvalidOption(f"rename makes {new!r:.80} of {name!r}, and that is no name")
            return new
        old = longest_prefix(name, self.rename)
        return name if old is None else with_prefix(name, old, self.rename[old])

    @cached_property
    def _globs(self) -> Globs | None:
        return None if self.keys is None else Globs(self.keys)

    @cached_property
    def _renamed_to(self) -> dict[str, list[str]]:
        """A mapping's keys, by what it makes of them."""
        found: dict[str, list[str]] = {}
        for old, new in self.rename.items() if isinstance(self.rename, Mapping) else ():
            found.setdefault(new, []).append(old)
        return found


def is_renaming(rename: object) -> bool:
    """Whether it maps names to names."""
    return isinstance(rename, Mapping) and all(isinstance(name, str) for pair in rename.items() for name in pair)


def check_keys(keys: Sequence[str] | None) -> None:
    """``InvalidOption`` for ``keys`` that are no globs."""
    if isinstance(keys, str):
        raise InvalidOption(f"keys takes a sequence of patterns, such as [{keys!r}], not a single string")
    if keys is None or (isinstance(keys, Collection) and keys and all(isinstance(key, str) for key in keys)):
        return
    raise InvalidOption(f"keys takes a sequence of patterns, such as ['model.*'], not {keys!r:.80}")


def known_device(device: torch.device | str) -> torch.device:
    """torch's device; ``InvalidOption`` for what it does not know, and for "meta", where nothing can be loaded to."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidOption(f"device takes a device of torch, such as 'cuda', not {device!r:.80}") from error
    if found.type == "meta":
        raise InvalidOption("device takes a device where tensors hold data, not 'meta'")
    return found


def prefixes_of(name: str) -> Iterator[str]:
    """``name``, and what it begins with up to each dot, the longest first; at last "", which is one of every name."""
    ends = (len(name), *(n for n in range(len(name) - 1, 0, -1) if name[n] == "."), 0)
    return (name[:end] for end in ends)


def longest_prefix(name: str, prefixes: Container[str]) -> str | None:
    """The longest of ``prefixes`` that is one of ``name``."""
    return next((prefix for prefix in prefixes_of(name) if prefix in prefixes), None)


def with_prefix(name: str, old: str, new: str) -> str:
    """``name``, whose prefix is ``old``, with the prefix ``new``."""
    rest = name[len(old) :].removeprefix(".") if old else name
    return ".".join(part for part in (new, rest) if part)
