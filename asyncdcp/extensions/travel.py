"""An extension as typed data, so that the background process can make an equal one.

What is sent comes from the trainer's own objects: the import path of their class and its arguments. Nothing here is
ever read from a checkpoint.
"""

from __future__ import annotations

import sys
from functools import reduce
from importlib import import_module
from typing import Any

import msgspec

from asyncdcp.errors import InvalidOption
from asyncdcp.extensions.base import Extension


class ExtensionSpec(msgspec.Struct, frozen=True):
    """The class ``name`` of ``module``, to be made by its ``arrive(arguments)``. The arguments may hold secrets."""

    module: str
    name: str
    arguments: dict[str, Any]

    def __repr__(self) -> str:
        return f"ExtensionSpec({self.module}.{self.name})"


def spec_of(extension: Extension) -> ExtensionSpec | None:
    """The extension's spec; None if it says that it cannot travel, or its class cannot be imported elsewhere."""
    kind, arguments = type(extension), extension.travel()
    if arguments is None or kind.__module__ == "__main__" or _found(sys.modules.get(kind.__module__), kind) is not kind:
        return None
    try:
        plain = msgspec.json.decode(msgspec.json.encode(dict(arguments)))
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidOption(
            f"{kind.__qualname__}.travel() returned what JSON cannot carry; let it return keyword arguments of plain "
            "values, or None"
        ) from error
    return ExtensionSpec(kind.__module__, kind.__qualname__, plain)


def extension_of(spec: ExtensionSpec) -> Extension:
    """The extension of a spec. ``InvalidOption`` if it cannot be made here."""
    try:
        kind = reduce(getattr, spec.name.split("."), import_module(spec.module))
        made = kind.arrive(spec.arguments)
    except Exception as error:
        raise InvalidOption(
            f"the extension {spec.module}.{spec.name} could not be made in the background process "
            f"({type(error).__name__}: {error}); make its module importable there, or use process=False"
        ) from error
    if not isinstance(made, Extension):
        raise InvalidOption(f"{spec.module}.{spec.name}.arrive() returned no extension, but {type(made).__qualname__}")
    return made


def _found(module: Any, kind: type[Extension]) -> Any:
    try:
        return reduce(getattr, kind.__qualname__.split("."), module)
    except AttributeError:  # a class made in a function, or replaced since
        return None
