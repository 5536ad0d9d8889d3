"""What lies on disk, and what a reader makes of it.

Three kinds of file make a checkpoint (format version 1): data files, one ``Index`` per rank that describes what the
rank wrote, and one small ``Record`` per save, which is the commit (or the abort). ``Record`` and ``Index`` are JSON in
the envelope of ``envelope.py``.

``format/README.md`` says all of it for those who write a reader, and changes with what is here.

``Metadata`` is the read-side union of all ranks' indexes. It uses the names of
``torch.distributed.checkpoint.metadata`` where the concept is the same; dtypes are strings, torch's own names without
the ``torch.`` ("bfloat16").

Nothing here does I/O; ``pipeline/reader.py`` checks what was read against these types before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

RECORD_LIMIT = 64 << 20
"""The most bytes a Record may have: 16,384 ranks at some hundred bytes each, and the user's metadata."""
USER_METADATA_LIMIT = 32 << 20
"""The most bytes of the user's metadata, which leaves the rest room, and what encryption adds."""
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


class WrittenColumns(ChunkColumns, frozen=True, forbid_unknown_fields=True):
    """Chunks that a rank wrote, and where their bytes begin.

    ``file`` is the number of the data file, ``begin`` the chunk's first byte in the *decoded* file. Its length follows
    from sizes and dtype; elements are row-major, little-endian.
    """

    file: list[int]
    begin: list[int]


class ImageShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A decoded data file: ``size`` bytes in all, of which the safetensors header takes the first ``data_start``."""

    size: int
    data_start: int


class IndexPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The part of an Index that follows from the structure of the state alone, encoded once and kept over saves.

    ``names``, ``dtypes`` and ``shapes`` are of the whole (unsharded) tensors. ``aliases`` maps the FQN of a tied tensor
    to the one that is stored. ``tree`` is the container structure, with the FQNs at its leaves. ``own`` are the names
    of tensors, aliases and values that are this rank's own (``PerRank``): on other ranks they mean something else.
    """

    names: list[str]
    dtypes: list[str]
    shapes: list[tuple[int, ...]]
    aliases: dict[str, str]
    written: WrittenColumns
    images: list[ImageShape]
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


# ── the read side ───────────────────────────────────────────────────────────────────────────────────────────────────


class TensorProperties(msgspec.Struct, frozen=True, gc=False):
    """Of a tensor's properties only ``dtype`` is kept: layout is strided, memory format contiguous, by definition."""

    dtype: str


class ChunkStorageMetadata(msgspec.Struct, frozen=True):
    """A chunk of a tensor: ``offsets`` and ``sizes`` per dimension, in elements."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class TensorStorageMetadata(msgspec.Struct, frozen=True, gc=False):
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


class ChunkLocation(msgspec.Struct, frozen=True, gc=False):
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
