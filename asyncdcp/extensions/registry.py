"""From what a checkpoint says to what opens it: ``ExtensionRegistry`` finds the extensions of its descriptors,
``Seals`` opens the sealed bodies of its Record and indexes, and knows which of them were authentic.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from asyncdcp.envelope import Seal
from asyncdcp.errors import CorruptCheckpoint, InvalidOption, KeyUnavailable, UnsupportedFormat, UsageError
from asyncdcp.extensions.aesgcm import AESGCM
from asyncdcp.extensions.base import Extension, SealingExtension, said
from asyncdcp.extensions.chain import Chain
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


class Seals:
    """An ``Unseal``. A body in clear whose key is not at hand is passed on unverified; ``require`` is for those that
    must have been.
    """

    def __init__(self, registry: ExtensionRegistry) -> None:
        self._registry = registry
        self._verified: set[str] = set()
        self._found: dict[str, Extension] = {}
        self._unseen: dict[str, str] = {}  # why a seal could not be looked at

    @classmethod
    def of(cls, chain: Chain) -> Seals:
        """With the keys of the extensions that a save is made with."""
        return cls(ExtensionRegistry(chain.extensions))

    def __call__(self, seal: Seal | None, body: bytes, name: str) -> bytes:
        """The body. ``CorruptCheckpoint`` if it is not what was sealed, ``KeyUnavailable`` if it is encrypted and the
        key is not at hand.
        """
        if seal is None:
            return body
        try:
            extension = self._extension(seal.by)
            if not isinstance(extension, SealingExtension):
                raise CorruptCheckpoint(f"{name}: {seal.by} seals nothing", path=name)
            opened = extension.unseal(bytes.fromhex(seal.token), body, name[:20], name, hidden=seal.hidden)
        except (KeyUnavailable, UnsupportedFormat) as error:
            if seal.hidden:
                raise KeyUnavailable(f"{name} is encrypted: {error}", path=name) from error
            self._unseen[name] = str(error)
            return body
        except UsageError:  # some are ValueErrors
            raise
        except ValueError as error:
            raise CorruptCheckpoint(f"{name}: is not what was sealed by {seal.by}: {error}", path=name) from error
        self._verified.add(name)
        return opened

    def _extension(self, descriptor: str) -> Extension:
        if descriptor not in self._found:
            self._found[descriptor] = self._registry.from_descriptor(descriptor)
        return self._found[descriptor]

    def add(self, name: str) -> None:
        """Somebody else has seen that this one is authentic."""
        self._verified.add(name)

    def add_unseen(self, name: str, why: str) -> None:
        """Somebody else could not look at the seal of this one."""
        self._unseen[name] = why

    def unseen(self, name: str) -> str:
        """Why the seal of this one could not be looked at; "" where it was, or there is none."""
        return self._unseen.get(name, "")

    def __contains__(self, name: str) -> bool:
        return name in self._verified

    def require(self, names: Iterable[str]) -> None:
        """``CorruptCheckpoint`` unless each of these was seen to be authentic: somebody may have taken its seal off.
        ``KeyUnavailable`` if that could not be told: the key may have been out of reach for that moment only.
        """
        for name in names:
            if name not in self._verified:
                if why := self.unseen(name):
                    raise KeyUnavailable(f"{name} could not be authenticated: {why}", path=name)
                raise CorruptCheckpoint(f"{name} is not authenticated, and the data that it describes is", path=name)
