"""Keys for encryption: given as bytes, by a callable, or by an environment variable."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Callable, Iterable
from typing import TypeAlias

from asyncdcp.errors import InvalidOption, KeyUnavailable

KeyProvider: TypeAlias = Callable[[str], bytes]
"""Returns the key of an id; raises KeyError for one that it does not have."""

KEY_VARIABLE = "ASYNCDCP_KEY"
KEY_BYTES = 32


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
