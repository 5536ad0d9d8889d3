"""The ``.metadata`` that makes a folder a DCP checkpoint: a pickle, read without running anything that it says, and
published in the one moment in which the checkpoint comes into being.

The unpickler knows DCP's own metadata classes by name and nothing else, and not even these are handed out: what a
pickle gets makes blank objects, and has no attribute that a pickle could change for the rest of the process. What
comes of it is then checked, field by field, so that the planners need not expect the impossible.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from asyncdcp.errors import CorruptCheckpoint, InvalidOption
from asyncdcp.storage.files import sync_directory, translated

_LIMIT: Final = 1 << 62
_MEMORY_FORMATS: Final = (torch.contiguous_format, torch.channels_last, torch.preserve_format)
_LAYOUTS: Final = {str(layout): layout for layout in vars(torch).values() if isinstance(layout, torch.layout)}
_DTYPES: Final = {name: dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}
_METADATA = re.compile(r"(__\d+)?\.metadata")
_DATA = re.compile(r"__\d+_.*\.distcp")
_logger = logging.getLogger("asyncdcp")


def load_metadata(data: bytes, name: str) -> Metadata:
    """The metadata that a ``.metadata`` file holds; ``CorruptCheckpoint`` naming ``name`` for anything else."""
    try:
        found = _Unpickler(data).load()
    except _Refused as error:
        raise CorruptCheckpoint(
            f"{name}: its pickle asks for {error}, which no metadata of DCP has. It was refused, and nothing of it was "
            "run. If you trust its origin, torch's own FileSystemReader reads it",
            path=name,
        ) from None
    except Exception as error:  # whatever a damaged pickle may make of the few objects that it gets
        raise CorruptCheckpoint(
            f"{name}: not a metadata pickle ({type(error).__name__}: {error!s:.200})", path=name
        ) from error
    try:
        return _checked(found)
    except _Malformed as error:
        raise CorruptCheckpoint(f"{name}: {error}", path=name) from None


# ── the unpickler ───────────────────────────────────────────────────────────────────────────────────────────────────


class _Refused(Exception):
    """A global that is not on the list."""


class _Properties(TensorProperties):
    """Until its state is set, which it checks itself, since a ``torch.memory_format`` is stored as a number."""

    def __setstate__(self, state: Any) -> None:
        dtype, layout, requires_grad, number, pin_memory = state[:5]
        self.__class__ = TensorProperties  # type: ignore[assignment]  # a class of the same layout
        self.dtype, self.layout, self.requires_grad, self.pin_memory = dtype, layout, requires_grad, pin_memory
        self.memory_format = _MEMORY_FORMATS[number]
        if "strides" in TensorProperties.__dataclass_fields__:  # torch 2.15 stores how the tensor lay in memory
            self.__dict__["strides"] = state[5] if len(state) > 5 else None


def _maker(kind: type) -> type:
    """What stands for ``kind`` in one unpickling: calling it makes a blank ``kind``, and it takes no attributes.

    A class that pickles could set attributes on would be changed for the whole process; here ``__setstate__``, which
    they are set by, is a function that lacks an argument.
    """

    def make(cls: type) -> Any:
        return object.__new__(kind)

    return type(kind.__name__, (), {"__new__": make, "__setstate__": _no_state})


def _path_maker() -> type:
    def make(cls: type, *parts: str) -> str:
        return os.path.join("", *parts)

    return type("Path", (), {"__new__": make, "__setstate__": _no_state})


def _no_state(self: object, state: object) -> NoReturn:
    raise pickle.UnpicklingError("a class has no state")


_KINDS: Final[dict[tuple[str, str], type]] = {
    **{
        (metadata.__name__, kind.__name__): kind
        for kind in (
            *(Metadata, MetadataIndex, StorageMeta),
            *(TensorStorageMetadata, BytesStorageMetadata, ChunkStorageMetadata),
        )
    },
    (metadata.__name__, "TensorProperties"): _Properties,
    (filesystem.__name__, "_StorageInfo"): _StorageInfo,
}
_PATHS: Final = frozenset(
    (module, f"{flavour}Path") for module in ("pathlib", "pathlib._local") for flavour in ("Posix", "Windows", "")
)


class _Unpickler(pickle.Unpickler):
    """Gives out makers, made anew for each pickle, and immutable objects of C: there is nothing to change."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._made: dict[tuple[str, str], Any] = {
            ("torch", "Size"): torch.Size,
            ("torch.serialization", "_get_layout"): _LAYOUTS.__getitem__,
            (metadata.__name__, "_MEM_FORMAT_ENCODING"): dict(enumerate(range(len(_MEMORY_FORMATS)))).__getitem__,
        }

    def find_class(self, module: str, name: str) -> Any:
        key = (module, name)
        if key in self._made:
            return self._made[key]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if key in _KINDS:
            made = _maker(_KINDS[key])
        elif key in _PATHS:
            made = _path_maker()
        else:
            raise _Refused(f"{module}.{name}"[:200])
        self._made[key] = made
        return made


# ── what came of it ─────────────────────────────────────────────────────────────────────────────────────────────────


class _Malformed(Exception):
    """The objects are not those of a metadata."""


def _checked(found: Any) -> Metadata:
    if type(found) is not Metadata:
        raise _Malformed("it holds no Metadata")
    fields = vars(found)
    stored: Any = fields.get("state_dict_metadata")
    _expect(type(stored) is dict, "its state_dict_metadata is no dict")
    for name, entry in stored.items():
        _expect(type(name) is str, "a name is no string")
        if type(entry) is not BytesStorageMetadata:
            _check_tensor(name, entry)
    locations: Any = fields.get("storage_data")
    _expect(type(locations) is dict, "its storage_data is no dict")
    for index, info in locations.items():
        _check_index(index)
        _check_info(index, info)
    _check_paths(fields.get("planner_data"))
    meta = fields.get("storage_meta")
    _expect(meta is None or type(meta) is StorageMeta, "its storage_meta is none")
    _expect(type(fields.get("version")) in (str, type(None)), "its version is no string")
    found.__dict__.update({name: fields.get(name) for name in Metadata.__dataclass_fields__})
    if meta is not None:
        found.storage_meta = StorageMeta(_text(vars(meta).get("checkpoint_id")), _text(vars(meta).get("save_id")))
    return found


def _text(value: Any) -> str | None:
    return value if type(value) is str else None


def _check_tensor(name: str, entry: Any) -> None:
    _expect(type(entry) is TensorStorageMetadata, f"{name!r} is neither tensor nor bytes")
    fields = vars(entry)
    properties, size, chunks = (fields.get(field) for field in ("properties", "size", "chunks"))
    _expect(type(properties) is TensorProperties and type(properties.dtype) is torch.dtype, f"{name!r} has no dtype")
    strides = getattr(properties, "strides", None)
    _expect(strides is None or (type(strides) is tuple and _all(int, strides)), f"{name!r} has odd strides")
    _check_size(name, size)
    _expect(type(chunks) is list, f"{name!r} has no chunks")
    for chunk in chunks:
        _expect(type(chunk) is ChunkStorageMetadata, f"{name!r} has a chunk that is none")
        for part in (vars(chunk).get("offsets"), vars(chunk).get("sizes")):
            _check_size(name, part)
            _expect(len(part) == len(size), f"{name!r} has a chunk of other dimensions")


def _check_size(name: str, size: Any) -> None:
    good = type(size) is torch.Size and len(size) <= 64 and all(0 <= extent < _LIMIT for extent in size)
    _expect(good, f"{name!r} has an impossible shape")


def _check_index(index: Any) -> None:
    _expect(type(index) is MetadataIndex and type(vars(index).get("fqn")) is str, "a location is of nothing")
    offset, hint = vars(index).get("offset"), vars(index).get("index")
    if offset is not None:
        _check_size(index.fqn, offset)
    _expect(hint is None or type(hint) is int, f"{index.fqn!r} has a location with an odd hint")


def _check_info(index: MetadataIndex, info: Any) -> None:
    _expect(type(info) is _StorageInfo, f"the location of {index.fqn!r} is none")
    fields = vars(info)
    path, transforms = fields.get("relative_path"), fields.get("transform_descriptors")
    plain = type(path) is str and path not in ("", ".", "..") and "/" not in path and "\0" not in path
    _expect(plain, f"the location of {index.fqn!r} leaves the checkpoint: {path!r:.200}")
    numbers = (fields.get("offset"), fields.get("length"))
    _expect(all(type(n) is int and 0 <= n < _LIMIT for n in numbers), f"the location of {index.fqn!r} is out of range")
    known = transforms is None or (type(transforms) in (list, tuple) and _all(str, transforms))
    _expect(known, f"the transforms of {index.fqn!r} are none")


def _check_paths(mapping: Any) -> None:
    """What the default planner stores: where in the nested state each name stands. Other planners store plain data."""
    if type(mapping) is dict:
        for path in mapping.values():
            if type(path) is tuple:
                _expect(bool(path) and _all((str, int), path), "a path in its planner_data is none")


def _all(kinds: type | tuple[type, ...], items: Iterable[Any]) -> bool:
    return all(isinstance(item, kinds) for item in items)


def _expect(condition: bool, what: str) -> None:  # noqa: FBT001  # as of an assert
    if not condition:
        raise _Malformed(what)


def publish(path: Path, data: bytes, *, sync: bool) -> None:
    """Puts ``data`` in the place of ``path`` at once and whole, durable if ``sync``; ``StorageError`` otherwise.

    A crash leaves what was there before, or the new file.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    with translated("write", os.fspath(path)):
        made = _make(path.parent)
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        if sync:
            for directory in (path.parent, *made):
                sync_directory(directory)


def remove_unnamed(published: Path, prefix: str, named: set[str]) -> None:
    """Removes data files with ``prefix`` that are neither in ``named``, those of the metadata just ``published``, nor
    in other metadata beside it: they are of a checkpoint that was overwritten, or of a save that came to nothing. Where
    that cannot be told, nothing is removed.
    """
    directory = published.parent
    try:
        left = [path for path in _files(directory, _DATA) if path.name.startswith(prefix) and path.name not in named]
        others = [path for path in _files(directory, _METADATA) if path != published] if left else []
        kept = {name for path in others for name in _named(path)}
        for path in left:
            if path.name not in kept:
                path.unlink(missing_ok=True)
    except (OSError, CorruptCheckpoint) as error:
        _logger.warning("files of an earlier checkpoint in %s could not be removed: %s", directory, error)


def _named(path: Path) -> set[str]:
    places = load_metadata(path.read_bytes(), os.fspath(path)).storage_data
    return {info.relative_path for info in places.values()}


def _files(directory: Path, pattern: re.Pattern[str]) -> Iterator[Path]:
    return (path for path in directory.iterdir() if pattern.fullmatch(path.name))


def _make(directory: Path) -> list[Path]:
    """Makes a directory; the parents of all that were made."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    return [path.parent for path in missing]


def folder_of(given: str | os.PathLike[str]) -> Path:
    """As a path; ``InvalidOption`` for a URL, of which a folder with such a name would be made here."""
    if "://" in os.fspath(given):
        raise InvalidOption(
            f"path is {given!r}; DCP's writer and reader take a folder of this machine. "
            "AsyncCheckpointer and CheckpointManager take URLs"
        )
    return Path(given)
