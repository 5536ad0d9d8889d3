"""ExtensionRegistry: from the descriptors in a checkpoint to the extensions that decode it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from asyncdcp.errors import InvalidOption, KeyUnavailable, UnsupportedFormat, UsageError
from asyncdcp.extensions.aesgcm import AESGCM
from asyncdcp.extensions.base import Extension, said
from asyncdcp.extensions.planes import BytePlanes
from asyncdcp.extensions.zstd import ZStandard
from asyncdcp.names import is_descriptor

ENTRY_POINTS = "asyncdcp.extensions"
"""The group of Python entry points where installed packages offer extensions: ``registry name = module:Class``."""


class ExtensionRegistry:
    """Knows extensions by name: instances first (a checkpointer's own, with their keys), then registered classes (the
    built-in ones to begin with), then entry points of installed packages.

    What a checkpoint says is a name to look up here, never something to import.

    >>> asyncdcp.ExtensionRegistry().from_descriptor("stream.zstd/1").registry_name()
    'stream.zstd'
    """

    def __init__(self, instances: Iterable[Extension] = ()) -> None:
        self._instances = list(instances)
        for instance in self._instances:
            if not isinstance(instance, Extension):
                raise InvalidOption(f"ExtensionRegistry takes instances of extensions, not {instance!r:.80}")
        self._classes: dict[str, type[Extension]] = {}
        for kind in (ZStandard, BytePlanes, AESGCM):
            self.register(kind)

    def register(self, kind: type[Extension]) -> None:
        """Makes a class known by its ``registry_name()``; one of that name before is replaced."""
        if not (isinstance(kind, type) and issubclass(kind, Extension)):
            raise InvalidOption(f"register takes a subclass of Extension, not {kind!r}")
        self._classes[kind.registry_name()] = kind

    def with_instances(self, instances: Iterable[Extension]) -> ExtensionRegistry:
        """A copy that looks at ``instances`` first."""
        copied = ExtensionRegistry([*instances, *self._instances])
        copied._classes = dict(self._classes)
        return copied

    def from_descriptor_list(self, descriptors: Sequence[str]) -> list[Extension]:
        """The extensions that decode what these describe, in the same order.

        ``UnsupportedFormat`` for a name or version that nobody knows; ``KeyUnavailable`` where a key is missing.
        """
        return [self.from_descriptor(descriptor) for descriptor in descriptors]

    def from_descriptor(self, descriptor: str) -> Extension:
        """The extension of one descriptor."""
        if not is_descriptor(descriptor):
            raise UnsupportedFormat(
                f"{descriptor[:80]!r} is not the descriptor of an extension (name[@domain]/version)"
            )
        name, _, version = descriptor.partition("/")
        missing: KeyUnavailable | None = None
        for candidate in self._candidates(name):
            try:
                return _reader(candidate, version)
            except KeyUnavailable as error:  # another instance may have that key
                missing = missing or error
            except UsageError:  # what the user gave, not what the checkpoint says
                raise
            except Exception as error:
                raise UnsupportedFormat(
                    f"the data was transformed by {descriptor}, which is not readable here: {said(error)}"
                ) from error
        raise missing or UnsupportedFormat(self._unknown(descriptor, name))

    def _candidates(self, name: str) -> Iterable[Extension | type[Extension]]:
        yield from (instance for instance in self._instances if instance.registry_name() == name)
        if name in self._classes:
            yield self._classes[name]
            return
        from importlib.metadata import entry_points  # slow to import, and most never come here

        for point in entry_points(group=ENTRY_POINTS, name=name):
            try:
                found = point.load()
            except Exception as error:
                raise UnsupportedFormat(
                    f"the extension {name} could not be loaded from the entry point {point.value}: "
                    f"{type(error).__name__}: {error}"
                ) from error
            if not (isinstance(found, type) and issubclass(found, Extension)):
                raise InvalidOption(f"the entry point {point.value} of {ENTRY_POINTS} is no Extension")
            yield found

    def _unknown(self, descriptor: str, name: str) -> str:
        return (
            f"the data was transformed by {descriptor}, which is not known here; install the package that provides "
            f"it (entry point {name!r} of the group {ENTRY_POINTS}), or give the checkpointer the extension "
            f"(extensions=) or its class (registry=). Known are {', '.join(sorted(self._classes))}"
        )


def known_extensions(registry: ExtensionRegistry | None, extensions: Iterable[Extension]) -> ExtensionRegistry:
    """What a checkpointer of these two options reads with."""
    if not isinstance(registry, ExtensionRegistry | None):
        raise InvalidOption(f"registry takes an ExtensionRegistry, not {registry!r:.80}")
    return (registry or ExtensionRegistry()).with_instances(extensions)


def _reader(candidate: Extension | type[Extension], version: str) -> Extension:
    made = candidate.reader if isinstance(candidate, Extension) else candidate.from_descriptor
    found: object = made(version)
    if not isinstance(found, Extension):
        raise InvalidOption(f"{made.__qualname__}({version!r}) returned no Extension, but {found!r:.80}")
    return found
