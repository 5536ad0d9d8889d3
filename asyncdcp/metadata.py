"""What lies on disk, and what a reader makes of it.

Three kinds of file make a checkpoint (format version 1): data files, one ``Index`` per rank that describes what the
rank wrote, and one small ``Record`` per save, which is the commit (or the abort). ``Record`` and ``Index`` are JSON in
an envelope that names format, version and kind and carries a digest of the body's bytes:

    {"format": "asyncdcp", "version": 1, "kind": "record", "digest": "<xxh3-128 hex of body>", "body": …}

An encrypting extension adds a ``seal`` before the digest, which covers it: a token over the body, or the mark of an
encrypted body, which is base64.

``format/README.md`` says all of it for those who write a reader, and changes with what is here.

``Metadata`` is the read-side union of all ranks' indexes. It uses the names of
``torch.distributed.checkpoint.metadata`` where the concept is the same; dtypes are strings, torch's own names without
the ``torch.`` ("bfloat16").

Nothing here does I/O; ``pipeline/reader.py`` checks what was read against these types before it is used.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import msgspec
import xxhash

from asyncdcp.errors import CorruptCheckpoint, KeyUnavailable, UnsupportedFormat
from asyncdcp.names import index_name, record_name

FORMAT_VERSION = 1
RECORD_LIMIT = 64 << 20
"""The most bytes a Record may have: 16,384 ranks at some hundred bytes each, and the user's metadata."""
INDEX_LIMIT = 4 << 30
"""The most bytes an Index may have: 90 million chunks."""

DTYPE_SIZES: dict[str, int] = {
    **dict.fromkeys(("complex128",), 16),
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 8),
    **dict.fromkeys(("float32", "int32", "uint32", "complex32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16", "bits16"), 2),
    **dict.fromkeys(("bool", "uint8", "int8", "bits8", "bits1x8", "bits2x4", "bits4x2"), 1),
    **dict.fromkeys(("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
    **dict.fromkeys(("float4_e2m1fn_x2",), 1),
    **dict.fromkeys((f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)), 1),
}
"""Every dtype that can be stored, with the size of an element in bytes."""


# ── on disk: the Index of a rank ────────────────────────────────────────────────────────────────────────────────────


class ChunkColumns(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Chunks (boxes of tensors) as columns, a row a chunk.

    ``tensor`` is the number of the tensor in ``IndexPlan.names``. ``offsets`` and ``sizes`` are flat: a chunk's are as
    many as its tensor has dimensions, in elements.
    """

    tensor: list[int]
    offsets: list[int]
    sizes: list[int]


class WrittenColumns(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Chunks that a rank wrote: as ``ChunkColumns``, and where their bytes begin.

    ``file`` is the number of the data file, ``begin`` the chunk's first byte in the *decoded* file. Its length follows
    from sizes and dtype; elements are row-major, little-endian.
    """

    tensor: list[int]
    offsets: list[int]
    sizes: list[int]
    file: list[int]
    begin: list[int]


class ImageShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A decoded data file: ``size`` bytes in all, of which the safetensors header takes the first ``data_start``."""

    size: int
    data_start: int


class IndexPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The part of an Index that follows from the structure of the state alone, encoded once and kept over saves.

    ``names``, ``dtypes`` and ``shapes`` are of the whole (unsharded) tensors. ``aliases`` maps the FQN of a tied tensor
    to the one that is stored. ``held`` are the chunks this rank had in memory, None where they are exactly the written
    ones. ``tree`` is the container structure, with the FQNs at its leaves. ``own`` are the names of tensors, aliases
    and values that are this rank's own (``PerRank``): on other ranks they mean something else.
    """

    names: list[str]
    dtypes: list[str]
    shapes: list[tuple[int, ...]]
    aliases: dict[str, str]
    written: WrittenColumns
    images: list[ImageShape]
    held: ChunkColumns | None
    tree: msgspec.Raw
    own: list[str] = []


class FileTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A data file as stored: its blocks, back to back.

    ``checksums`` are XXH3-64 (little-endian, 8 bytes each) of the blocks' *stored* bytes. ``lengths`` are the blocks'
    stored lengths, None where no transform changed them.
    """

    name: str
    stored_size: int
    checksums: bytes
    lengths: list[int] | None = None


class Index(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one rank wrote. ``transforms`` are descriptors in the order they were applied at save."""

    save_id: str
    rank: int
    block_bytes: int
    transforms: list[str]
    plan: IndexPlan
    values: dict[str, msgspec.Raw]
    files: list[FileTable]


# ── on disk: the Record of a save ───────────────────────────────────────────────────────────────────────────────────


class IndexRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rank's Index by name, size in bytes and digest (XXH3-128, hex) of the whole file."""

    name: str
    size: int
    digest: str


class Summary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """For people and listings: tensors, their bytes, bytes stored in data files, transforms used."""

    tensors: int
    tensor_bytes: int
    stored_bytes: int
    transforms: list[str]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The outcome of a save, claimed create-exclusively under ``<save_id>.json``.

    A ``commit`` lists every rank's index, and in ``replaces`` the save ids of the commits it takes the place of. An
    ``abort`` says which ``rank`` gave up, or was waited for in vain, and the ``cause``. ``time`` is seconds since the
    epoch, for people only. ``term`` and ``parent`` (a save id) belong to the lineage of a run, ``metrics`` are what the
    training said of itself; None stands for a number that is not finite.
    """

    save_id: str
    outcome: Literal["commit", "abort"]
    time: float
    world_size: int
    versions: dict[str, str]
    replaces: list[str] = []
    indexes: list[IndexRef] = []
    summary: Summary | None = None
    metadata: dict[str, Any] = {}
    rank: int | None = None
    cause: str | None = None
    term: int | None = None
    parent: str | None = None
    metrics: dict[str, float | None] = {}


class RunStamp(msgspec.Struct, frozen=True):
    """A save's place in a run, for its Record: the run's ``term``, the checkpoint that the training went on from, and
    what it said of itself. Within its directory, a save with a stamp takes the place of what earlier terms committed
    there; it is ``Fenced`` where a later term has.
    """

    term: int
    parent: str | None
    metrics: dict[str, float | None]


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


# ── the read side ───────────────────────────────────────────────────────────────────────────────────────────────────


class TensorProperties(msgspec.Struct, frozen=True):
    """Of a tensor's properties only ``dtype`` is kept: layout is strided, memory format contiguous, by definition."""

    dtype: str


class ChunkStorageMetadata(msgspec.Struct, frozen=True):
    """A chunk of a tensor: ``offsets`` and ``sizes`` per dimension, in elements."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class TensorStorageMetadata(msgspec.Struct, frozen=True):
    """A stored tensor: properties, shape (``size``) and the chunks that together cover it."""

    properties: TensorProperties
    size: tuple[int, ...]
    chunks: Sequence[ChunkStorageMetadata]


class BytesStorageMetadata(msgspec.Struct, frozen=True):
    """A stored plain value; ``length`` is that of its JSON, in bytes."""

    length: int


class MetadataIndex(NamedTuple):
    """Names one chunk: the tensor's FQN and the chunk's offsets."""

    fqn: str
    offset: tuple[int, ...]


class ChunkLocation(msgspec.Struct, frozen=True):
    """Where a chunk's bytes are: in the *decoded* data file ``file``, from ``begin``, ``length`` of them."""

    file: str
    begin: int
    length: int


class StorageMeta(msgspec.Struct, frozen=True):
    """Which save a checkpoint is: its directory, save id, world size and the user's metadata."""

    checkpoint_id: str
    save_id: str
    world_size: int
    time: float
    user: dict[str, Any]


class Metadata(msgspec.Struct, frozen=True):
    """A checkpoint as a whole: what it holds and where, the union of all ranks' indexes.

    ``state_dict_metadata`` has every FQN that is stored; ``aliases`` the FQNs of tied tensors. ``storage_data`` places
    every chunk. ``tree`` and ``values`` are tagged JSON, for the layer that knows Python's containers. ``own`` are the
    FQNs of what each rank has for itself (``PerRank``), also where this view leaves them out.
    """

    state_dict_metadata: Mapping[str, TensorStorageMetadata | BytesStorageMetadata]
    storage_data: Mapping[MetadataIndex, ChunkLocation]
    storage_meta: StorageMeta
    aliases: dict[str, str]
    tree: msgspec.Raw
    values: dict[str, msgspec.Raw]
    own: frozenset[str] = frozenset()
