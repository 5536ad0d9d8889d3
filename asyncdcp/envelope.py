"""The envelope of a checkpoint's small files: Records and Indexes as bytes, and from bytes.

Both are JSON in an envelope that names format, version and kind and carries a digest of the body's bytes:

    {"format": "asyncdcp", "version": 1, "kind": "record", "digest": "<xxh3-128 hex of body>", "body": …}

An encrypting extension adds a ``seal`` before the digest, which covers it: a token over the body, or the mark of an
encrypted body, which is base64.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import TypeAlias, TypeVar

import msgspec
import xxhash

from asyncdcp.errors import CorruptCheckpoint, KeyUnavailable, UnsupportedFormat
from asyncdcp.metadata import FileTable, Index, Record
from asyncdcp.names import index_name, record_name

FORMAT_VERSION = 1


class Seal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an extension (descriptor ``by``) adds to a body: a ``token`` in hex. ``hidden`` bodies are encrypted."""

    by: str
    token: str
    hidden: bool


Sealer: TypeAlias = Callable[[bytes, str], tuple[Seal, bytes]]
"""From a body and its file's name to the seal, and the body as it is then: itself, or encrypted where ``hidden``."""
Unseal: TypeAlias = Callable[[Seal | None, bytes, str], bytes]
"""From what a ``Sealer`` made, and the file's name, to the body; raises if that is known not to be authentic."""


class _Envelope(msgspec.Struct, forbid_unknown_fields=True):
    format: str
    version: int
    kind: str
    digest: str
    body: msgspec.Raw
    seal: Seal | None = None


class _EnvelopeHead(msgspec.Struct):
    """Enough of an envelope, of any version, to say what it is."""

    format: str = ""
    version: int = 0


def digest(data: bytes) -> str:
    """XXH3-128 as 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(data)


def trusting(seal: Seal | None, body: bytes, name: str) -> bytes:
    """An ``Unseal`` without keys: what is not encrypted is taken as it is."""
    if seal is not None and seal.hidden:
        raise KeyUnavailable(f"{name} is encrypted by {seal.by[:100]}, and no key was given", path=name)
    return body


def _seal(kind: str, body: bytes, seal: Seal | None = None) -> bytes:
    by = "" if seal is None else f'"seal":{msgspec.json.encode(seal).decode()},'
    text = digest(by.encode() + body) if by else digest(body)
    head = f'{{"format":"asyncdcp","version":{FORMAT_VERSION},"kind":"{kind}",{by}"digest":"{text}","body":'
    return b"".join((head.encode(), body, b"}"))


def _sealed(kind: str, body: bytes, name: str, sealer: Sealer | None) -> bytes:
    if sealer is None:
        return _seal(kind, body)
    seal, body = sealer(body, name)
    return _seal(kind, b'"%s"' % base64.b64encode(body) if seal.hidden else body, seal)


def _open_envelope(data: bytes, kind: str, name: str, unseal: Unseal) -> bytes:
    try:
        data.decode()  # msgspec passes over what it does not decode now, such as values, without looking at it
        head = msgspec.json.decode(data, type=_EnvelopeHead)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{name}: not a JSON envelope of asyncdcp ({error})", path=name) from error
    if head.format != "asyncdcp":
        raise UnsupportedFormat(f"{name}: not a file of asyncdcp (format {head.format[:40]!r})", path=name)
    if head.version != FORMAT_VERSION:
        raise UnsupportedFormat(
            f"{name}: format version {head.version}, and this asyncdcp reads version {FORMAT_VERSION}; "
            "use a newer asyncdcp",
            path=name,
        )
    envelope = _decode(data, _Envelope, name)
    if envelope.kind != kind:
        raise CorruptCheckpoint(f"{name}: is a {envelope.kind[:40]!r}, expected a {kind!r}", path=name)
    body = bytes(envelope.body)
    if _seal(kind, body, envelope.seal) != data:  # there is one way to write it, down to the last space
        raise CorruptCheckpoint(f"{name}: its body does not match its digest", path=name)
    if envelope.seal is None or not envelope.seal.hidden:
        return unseal(envelope.seal, body, name)
    return unseal(envelope.seal, _decode(body, bytes, name), name)


_T = TypeVar("_T")


def _decode(data: bytes | msgspec.Raw, kind: type[_T], name: str) -> _T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{name}: does not fit its schema ({error})", path=name) from error


def encode_document(kind: str, content: msgspec.Struct) -> bytes:
    """The bytes of a small file of this kind: ``content`` in its envelope."""
    return _seal(kind, msgspec.json.encode(content))


def decode_document(kind: str, type_: type[_T], data: bytes, name: str) -> _T:
    """Such a file's content; ``CorruptCheckpoint`` or ``UnsupportedFormat`` naming ``name`` otherwise."""
    return _decode(_open_envelope(data, kind, name, trusting), type_, name)


def encode_record(record: Record, sealer: Sealer | None = None) -> bytes:
    """The bytes of a Record's file."""
    return _sealed("record", msgspec.json.encode(record), record_name(record.save_id), sealer)


def decode_record(data: bytes, name: str, unseal: Unseal = trusting) -> Record:
    """A Record from its file's bytes; ``CorruptCheckpoint`` or ``UnsupportedFormat`` naming ``name`` otherwise, and
    ``KeyUnavailable`` for an encrypted one whose key is not at hand.
    """
    return _decode(_open_envelope(data, "record", name, unseal), Record, name)


class IndexHead(msgspec.Struct, frozen=True):
    """The scalar fields of an ``Index``, for ``encode_index``."""

    save_id: str
    rank: int
    block_bytes: int
    transforms: list[str]


def encode_index(
    head: IndexHead, plan: bytes, values: bytes, files: list[FileTable], sealer: Sealer | None = None
) -> bytes:
    """The bytes of an Index's file, from a plan and values that are encoded already: only the tables are new work."""
    fields = msgspec.json.encode(head)[:-1]
    tables = msgspec.json.encode(files)
    body = b"".join((fields, b',"plan":', plan, b',"values":', values, b',"files":', tables, b"}"))
    return _sealed("index", body, index_name(head.save_id, head.rank), sealer)


def decode_index(data: bytes, name: str, unseal: Unseal = trusting) -> Index:
    """An Index from its file's bytes, schema-checked only; ``pipeline/reader.py`` checks what the numbers mean."""
    return _decode(_open_envelope(data, "index", name, unseal), Index, name)
