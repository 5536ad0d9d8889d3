"""AESGCM: authenticated encryption of a whole checkpoint, with AES-256-GCM of the package ``cryptography``.

What is bound to what: a key is derived for each save (HKDF-SHA256 of the user's key and the save's id). A block's file,
number and the number of blocks in its file are its associated data, so no block can be moved, dropped or replayed. The
Record and the indexes, which say how long files are and which bytes are which tensor's, carry a tag over their bodies,
bound to their names; or they are encrypted too. What remains possible to whoever can write to the storage is to put an
older checkpoint whole in the place of a newer one.

Nonces are 96 random bits under a key that lives for one save: 2^32 blocks of it, 4 PiB, are within NIST's bound.
"""

from __future__ import annotations

import base64
import binascii
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

from asyncdcp.config import check_flags
from asyncdcp.errors import InvalidOption, KeyUnavailable, MissingDependency
from asyncdcp.extensions.base import BlockContext, SealingExtension

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM as Cipher

KeyProvider: TypeAlias = Callable[[str], bytes]
"""Returns the key of an id; raises KeyError for one that it does not have."""

KEY_VARIABLE = "ASYNCDCP_KEY"
KEY_BYTES = 32
_NONCE, _TAG = 12, 16
_KEPT = 8
"""Derived keys that are kept: those of the last few saves."""
_Use = Literal["blocks", "bodies"]


class AESGCM(SealingExtension):
    """Encrypts data files whole, headers included, and authenticates Record and indexes.

    ``key`` is 32 random bytes, or a callable that returns them for a key id, to be called when they are needed. The id
    is stored in clear; by default it is derived from the key, from which nothing can be learned about it. A callable
    needs a ``key_id`` to save under. ``hide_metadata`` encrypts the bodies of Record and indexes too: names, shapes,
    plain values, the user's metadata. Without the key nobody can list or overwrite such a checkpoint.

    >>> import os
    >>> encryption = asyncdcp.AESGCM(os.urandom(32))
    >>> with asyncdcp.SyncCheckpointer(process=False, extensions=[encryption]) as checkpointer:
    ...     _ = checkpointer.save("secret", {"weight": torch.ones(3)})
    ...     print(checkpointer.load("secret"))
    {'weight': tensor([1., 1., 1.])}
    >>> with asyncdcp.SyncCheckpointer(process=False) as checkpointer:
    ...     checkpointer.load("secret")
    Traceback (most recent call last):
    asyncdcp.errors.KeyUnavailable: ...
    """

    role = "encryption"

    def __init__(self, key: bytes | KeyProvider, *, key_id: str | None = None, hide_metadata: bool = False) -> None:
        check_flags(hide_metadata=hide_metadata)
        self._provider = key if callable(key) else None
        self._key = None if callable(key) else check_key(key)
        if self._key is None and key_id is None:
            raise InvalidOption("key is a callable: AESGCM takes a key_id too, the id of the key to save with")
        self._key_id = _check_id(key_id) if key_id is not None else key_name(self._key or b"")
        self._hide = hide_metadata
        self._lock = threading.RLock()  # a signal's handler may save while the provider is asked
        self._ciphers: OrderedDict[tuple[str, _Use], Cipher] = OrderedDict()

    @classmethod
    def from_environment(cls, variable: str = KEY_VARIABLE, *, hide_metadata: bool = False) -> AESGCM:
        """With the key in an environment variable, in hex or base64. Of several, separated by commas, the first is
        saved with, and all are there to load.
        """
        keys = keys_in_environment(variable)
        return cls(ring(keys, key_name), key_id=key_name(keys[0]), hide_metadata=hide_metadata)

    @staticmethod
    def registry_name() -> str:
        return "encrypt.aesgcm"

    @staticmethod
    def from_descriptor(version: str) -> AESGCM:
        """With the key of that id out of the environment variable ``ASYNCDCP_KEY``."""
        key_id, why = _key_id(version), f"the environment variable {KEY_VARIABLE} does not hold it"
        try:
            known = AESGCM.from_environment()
            with suppress(KeyUnavailable):
                return known.reader(version)
        except KeyUnavailable as error:
            why = str(error)
        raise KeyUnavailable(
            f"the data is encrypted with the key {key_id!r}, and {why}; give the checkpointer the key "
            f"(extensions=[AESGCM(key)]), or set {KEY_VARIABLE}"
        )

    def get_descriptor(self) -> str:
        return f"{self.registry_name()}/1.{self._key_id}"

    def reader(self, version: str) -> AESGCM:
        key_id = _key_id(version)
        if key_id == self._key_id:
            self._resolved()
            return self
        if self._provider is None:
            raise KeyUnavailable(
                f"the data is encrypted with the key {key_id!r}, and the key given is {self._key_id!r}"
            )
        other = AESGCM(self._provider, key_id=key_id, hide_metadata=self._hide)
        other._resolved()
        return other

    def travel(self) -> dict[str, Any]:
        return {"key": self._resolved().hex(), "key_id": self._key_id, "hide_metadata": self._hide}

    @classmethod
    def arrive(cls, arguments: Mapping[str, Any]) -> Self:
        return cls(**{**arguments, "key": bytes.fromhex(arguments["key"])})

    def __repr__(self) -> str:
        return f"AESGCM(key_id={self._key_id!r}, hide_metadata={self._hide})"

    # ── blocks ──

    def encode(self, data: memoryview, context: BlockContext) -> bytes:
        nonce = os.urandom(_NONCE)
        return nonce + self._cipher(context.save_id, "blocks").encrypt(nonce, data, _place(context))

    def decode(self, data: memoryview, context: BlockContext) -> bytes:
        if len(data) < _NONCE + _TAG:
            raise ValueError("it is too short to be encrypted")
        return self._decrypt(self._cipher(context.save_id, "blocks"), data, _place(context))

    # ── Record and indexes ──

    def seal(self, body: bytes, save_id: str, name: str) -> tuple[bytes, bytes | None]:
        nonce, cipher = os.urandom(_NONCE), self._cipher(save_id, "bodies")
        if self._hide:
            return b"", nonce + cipher.encrypt(nonce, body, _named(name, b""))
        return nonce + cipher.encrypt(nonce, b"", _named(name, body)), None

    def unseal(self, token: bytes, body: bytes, save_id: str, name: str, *, hidden: bool) -> bytes:
        cipher = self._cipher(save_id, "bodies")
        if hidden:
            return self._decrypt(cipher, memoryview(body), _named(name, b""))
        self._decrypt(cipher, memoryview(token), _named(name, body))
        return body

    def _decrypt(self, cipher: Cipher, data: memoryview, bound: bytes) -> bytes:
        from cryptography.exceptions import InvalidTag

        try:
            return cipher.decrypt(bytes(data[:_NONCE]), data[_NONCE:], bound)
        except InvalidTag:
            raise ValueError(
                f"it was changed, or moved here from elsewhere, or another key has the id {self._key_id!r}"
            ) from None

    # ── keys ──

    def _resolved(self) -> bytes:
        """The user's key, asked for once. ``KeyUnavailable`` where the provider does not have it, or fails."""
        with self._lock:
            if self._key is None:
                assert self._provider is not None
                try:
                    key = self._provider(self._key_id)
                except LookupError as error:
                    raise KeyUnavailable(f"there is no key {self._key_id!r}") from error
                except Exception as error:  # its text may say more than is to be shown
                    what = f"the key {self._key_id!r} could not be had: its provider raised {type(error).__name__}"
                    raise KeyUnavailable(what) from error
                self._key = check_key(key)
            return self._key

    def _cipher(self, save_id: str, use: _Use) -> Cipher:
        key = self._resolved()
        with self._lock:
            cipher = self._ciphers.get((save_id, use))
            if cipher is None:
                cipher = self._ciphers[save_id, use] = _derived(key, save_id, use)
                while len(self._ciphers) > _KEPT:
                    self._ciphers.popitem(last=False)
            return cipher


def check_key(key: object) -> bytes:
    """The key itself; ``InvalidOption`` unless it has the right length. The message never shows it."""
    if not isinstance(key, bytes | bytearray) or len(key) != KEY_BYTES:
        what = f"{len(key)} bytes" if isinstance(key, bytes | bytearray) else f"a {type(key).__name__}"
        raise InvalidOption(f"a key takes {KEY_BYTES} random bytes, such as of os.urandom({KEY_BYTES}), not {what}")
    return bytes(key)


def parse_key(text: str, source: str) -> bytes:
    """A key written in hex or in base64 (the usual or the URL-safe alphabet)."""
    text = text.strip()
    try:
        key = bytes.fromhex(text) if len(text) == 2 * KEY_BYTES else base64.b64decode(_usual(text), validate=True)
    except (ValueError, binascii.Error):
        key = b""
    if len(key) != KEY_BYTES:
        raise InvalidOption(f"{source} takes a key of {KEY_BYTES} bytes, written in hex or base64")
    return key


def keys_in_environment(variable: str) -> list[bytes]:
    """The keys in an environment variable, separated by commas: the one in use first, older ones after it.
    ``KeyUnavailable`` if it is not set.
    """
    text = os.environ.get(variable, "")
    if not text.strip():
        raise KeyUnavailable(f"the environment variable {variable} is not set")
    return [parse_key(part, f"the environment variable {variable}") for part in text.split(",")]


def ring(keys: Iterable[bytes], name: Callable[[bytes], str]) -> KeyProvider:
    """A provider over some keys, each under the id that ``name`` gives it."""
    return {name(key): key for key in keys}.__getitem__


def _usual(text: str) -> str:
    return text.replace("-", "+").replace("_", "/").ljust(-(-len(text) // 4) * 4, "=")


def key_name(key: bytes) -> str:
    """The id of a key: derived from it, so that it tells keys apart and nothing else."""
    return _hkdf(key, b"", "key id", 8).hex()


def _derived(key: bytes, save_id: str, use: _Use) -> Cipher:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM as Cipher

    return Cipher(_hkdf(key, save_id.encode(), use, 32))


def _hkdf(key: bytes, salt: bytes, use: str, length: int) -> bytes:
    try:
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    except ImportError as error:
        raise MissingDependency("AESGCM needs the package cryptography: pip install 'asyncdcp[encryption]'") from error
    return HKDF(SHA256(), length, salt, f"asyncdcp {AESGCM.registry_name()}/1 {use}".encode()).derive(key)


def _check_id(key_id: str) -> str:
    if not _is_id(key_id):
        raise InvalidOption(f"key_id takes 1 to 64 of [A-Za-z0-9._-], not {key_id!r}")
    return key_id


def _is_id(key_id: object) -> bool:
    return isinstance(key_id, str) and 0 < len(key_id) <= 64 and set(key_id) <= _ID_CHARACTERS


def _key_id(version: str) -> str:
    number, _, key_id = version.partition(".")
    if number != "1" or not _is_id(key_id):
        raise ValueError(f"version {version[:20]!r} of {AESGCM.registry_name()} is not known")
    return key_id


def _place(context: BlockContext) -> bytes:
    return f"{context.save_id}/{context.file}/{context.block}/{context.blocks}".encode()


def _named(name: str, body: bytes) -> bytes:
    return b"".join((name.encode(), b"\0", body))


_ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
