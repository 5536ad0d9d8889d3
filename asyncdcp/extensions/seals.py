"""Seals: opens the sealed bodies of a checkpoint's Record and indexes, and knows which of them were authentic."""

from __future__ import annotations

from collections.abc import Iterable

from asyncdcp.envelope import Seal
from asyncdcp.errors import CorruptCheckpoint, KeyUnavailable, UnsupportedFormat, UsageError
from asyncdcp.extensions.base import Extension, SealingExtension
from asyncdcp.extensions.chain import Chain
from asyncdcp.extensions.registry import ExtensionRegistry


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
