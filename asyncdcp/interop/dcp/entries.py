"""Entries of ``.distcp`` files: what ``torch.save`` wrote of one tensor or value, perhaps transformed.

An entry without transforms is a zip archive whose records are stored as they are, so a packed tensor's elements can be
read from their place in the file, without the rest. ``locate`` finds that place; every other entry is decoded whole.
"""

from __future__ import annotations

import io
import pickle
import sys
import zipfile
from collections import OrderedDict
from functools import partial
from math import prod
from typing import IO, Any, NamedTuple, cast

import torch
from torch import Tensor

from asyncdcp.errors import CorruptCheckpoint, UnsupportedFormat
from asyncdcp.state_dict.tensors import memory

EDGE_BYTES = 4096
"""At least this much of an entry's beginning and end ``locate`` has to see: headers and the pickle, the directory."""
VALUE_LIMIT = 1 << 32
"""The most bytes that a value may have once its transforms are undone."""
_SLACK = 1 << 20


class Entry(NamedTuple):
    """Where a chunk or value lies: ``length`` bytes of file ``path`` from ``offset`` on, and the transforms' names."""

    name: str
    path: str
    offset: int
    length: int
    transforms: tuple[str, ...]


class Chunk(NamedTuple):
    """What an entry has to hold: elements of this dtype and shape."""

    dtype: torch.dtype
    sizes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.sizes) * self.dtype.itemsize


class Place(NamedTuple):
    """Where a chunk's elements lie, packed and row-major: from byte ``begin`` of the file on; the record's CRC32.

    ``record`` is the byte at which that record begins, and its length; None where the writer left the CRC out.
    """

    begin: int
    record: tuple[int, int]
    crc: int | None


# ── the place of the elements ───────────────────────────────────────────────────────────────────────────────────────


class Edges(io.RawIOBase):
    """The beginning and the end of a long entry, as a file that has nothing in between."""

    def __init__(self, length: int, head: bytearray, tail: bytearray) -> None:
        self._length = length
        self._head = head
        self._tail = tail
        self._position = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError("seek before the beginning")
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        begin = self._position
        end = self._length if size < 0 else min(begin + size, self._length)
        start = self._length - len(self._tail)
        if end <= len(self._head):
            data = self._head[begin:end]
        elif begin >= start:
            data = self._tail[begin - start : end - start]
        else:
            raise EOFError("what is wanted lies in between")
        self._position = begin + len(data)
        return bytes(data)


class _View(NamedTuple):
    """The arguments of ``torch._utils._rebuild_tensor_v2`` and ``_v3``, of which only these matter here."""

    storage: Any
    offset: Any
    size: Any
    stride: Any
    dtype: Any


class _Storage(NamedTuple):
    dtype: torch.dtype | None
    key: Any
    location: Any


def _view_v2(storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any) -> _View:
    return _View(storage, offset, size, stride, None)


def _view_v3(storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any) -> _View:
    return _View(storage, offset, size, stride, dtype)


_STORAGES = {kind: dtype for dtype, kind in torch.storage._dtype_to_storage_type_map().items()}


class _TensorUnpickler(pickle.Unpickler):
    """Knows how ``torch.save`` describes one plain tensor. Makes no tensor, and gives out nothing that lasts."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            return partial(_view_v2 if name.endswith("2") else _view_v3)
        if module == "collections" and name == "OrderedDict":
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return None
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, location, _ = pid
        return _Storage(dtype, key, location)


def locate(entry: Entry, chunk: Chunk, edges: io.RawIOBase) -> Place | None:
    """The place of a chunk's elements in the file; None if the entry has to be decoded whole, damaged ones too.

    ``edges`` is the entry, of which the middle may be missing.
    """
    try:
        with zipfile.ZipFile(cast(IO[bytes], edges)) as archive:
            records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if len(records) != len(archive.infolist()) or _content(archive, records["byteorder"]) != b"little":
                return None
            view = _TensorUnpickler(io.BytesIO(_content(archive, records["data.pkl"]))).load()
            if sys.byteorder != "little" or not _is_packed(view, chunk):
                return None
            info = records[f"data/{view.storage.key}"]
            begin = _data_offset(edges, info)
    except Exception:  # noqa: BLE001  # what is odd is left to torch.load, which says what is wrong with it
        return None
    first = begin + view.offset * chunk.dtype.itemsize
    stored = info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size
    inside = begin + info.file_size <= entry.length and first + chunk.nbytes <= begin + info.file_size
    if not stored or not inside:
        return None
    return Place(entry.offset + first, (entry.offset + begin, info.file_size), info.CRC or None)


def _content(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """A small record, verified if it has a CRC (0 is what torch writes where it computes none)."""
    with archive.open(info) as record:
        if info.CRC == 0:
            record._expected_crc = None  # type: ignore[attr-defined]  # there is no public way
        return record.read()


def _is_packed(view: Any, chunk: Chunk) -> bool:
    if not isinstance(view, _View) or not isinstance(view.storage, _Storage) or view.storage.location != "cpu":
        return False
    strides, step = [], 1
    for size in reversed(chunk.sizes):
        strides.append(step)
        step *= size
    packed = all(
        size == 1 or stride == packed
        for size, stride, packed in zip(chunk.sizes, view.stride, reversed(strides), strict=True)
    )
    dtype = view.storage.dtype or view.dtype
    good = type(view.offset) is int and view.offset >= 0 and tuple(view.size) == chunk.sizes
    return good and packed and dtype == chunk.dtype and type(view.storage.key) is str


def _data_offset(archive: io.RawIOBase, info: zipfile.ZipInfo) -> int:
    """Where a record's bytes begin, behind its local header, whose name and extra field have lengths of their own."""
    archive.seek(info.header_offset)
    header = archive.read(30) or b""
    if len(header) != 30 or header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile("no header where the directory says")
    return info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


# ── whole entries ───────────────────────────────────────────────────────────────────────────────────────────────────


class NotPlain(Exception):
    """A value of objects that only running the checkpoint's code would make."""


def decode_tensor(entry: Entry, chunk: Chunk, data: bytes | bytearray, registry: Any = None) -> memoryview:
    """A chunk's elements, packed and row-major; ``CorruptCheckpoint`` if the entry holds anything else."""
    plain = undo(entry, data, chunk.nbytes + _SLACK, registry)
    try:
        tensor = _load(entry, plain)
    except NotPlain as error:
        raise _corrupt(entry, f"it is no tensor ({error!s:.200})") from error
    if not isinstance(tensor, Tensor) or tensor.dtype != chunk.dtype or tuple(tensor.shape) != chunk.sizes:
        raise _corrupt(entry, f"it is no {chunk.dtype} of shape {list(chunk.sizes)}")
    try:
        return memory(tensor)
    except ValueError as error:
        raise _corrupt(entry, str(error)) from error


def decode_value(entry: Entry, data: bytes | bytearray) -> Any:
    """The value of an entry. ``NotPlain`` if ``weights_only`` refuses it."""
    return _load(entry, undo(entry, data, VALUE_LIMIT))


def undo(entry: Entry, data: bytes | bytearray, limit: int, registry: Any = None) -> bytes | bytearray:
    """An entry's bytes as ``torch.save`` wrote them, ``limit`` of them at most.

    ``registry`` is a DCP ``ExtensionRegistry`` that knows the transforms; None for the one that knows torch's own.
    """
    if not entry.transforms:
        return data
    stream: Any = io.BytesIO(data)
    try:
        from torch.distributed.checkpoint._extension import ExtensionRegistry, StreamTransformExtension

        known = ExtensionRegistry() if registry is None else registry
        for extension in known.from_descriptor_list(entry.transforms):
            if isinstance(extension, StreamTransformExtension):
                stream = extension.transform_from(stream)
    except (ImportError, ValueError) as error:
        names = ", ".join(entry.transforms)
        raise UnsupportedFormat(
            f"{entry.path}: {entry.name} was transformed by {names}: {error}", path=entry.path, tensors=[entry.name]
        ) from error
    try:
        plain: bytes = stream.read(limit + 1)
    except Exception as error:  # each extension's own
        raise _corrupt(entry, f"its transforms cannot be undone ({type(error).__name__}: {error!s:.200})") from error
    if len(plain) > limit:
        raise _corrupt(entry, f"it is longer than {limit} bytes")
    return plain


def _load(entry: Entry, data: bytes | bytearray) -> Any:
    try:
        _verify(data)
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise NotPlain(str(error)) from error
    except Exception as error:  # torch raises many kinds for what is damaged
        raise _corrupt(entry, f"torch cannot load it ({type(error).__name__}: {error!s:.200})") from error


def _verify(data: bytes | bytearray) -> None:
    """Checks the records that have a CRC, which ``torch.load`` does not."""
    if zipfile.is_zipfile(io.BytesIO(data)):  # else it is of the time before torch 1.6
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED:
                    raise zipfile.BadZipFile("torch compresses nothing")
                _content(archive, info)


def _corrupt(entry: Entry, what: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"{entry.path}: the entry of {entry.name} at byte {entry.offset} is damaged: {what}",
        path=entry.path,
        tensors=[entry.name],
    )
