"""The names of a checkpoint's files. All begin with the save id, so a save's files can be told from any other's."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

_SAVE_ID = r"[0-9a-f]{20}"
_FILE = re.compile(rf"({_SAVE_ID})[-.].*")
_DESCRIPTOR = re.compile(r"[A-Za-z0-9_.-]{1,100}(@[A-Za-z0-9_.-]{1,100})?/[A-Za-z0-9_.-]{1,100}")
_RECORD = re.compile(rf"({_SAVE_ID})\.json")


def make_save_id(run_id: str, path: str, attempt: int) -> str:
    """20 hex digits. All ranks of a run compute the same without talking; ``attempt`` counts every save to ``path``."""
    text = "\0".join((run_id, path, str(attempt)))
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=10).hexdigest()


def record_name(save_id: str) -> str:
    """The Record of a save."""
    return f"{save_id}.json"


def record_save_id(name: str) -> str | None:
    """The save id of a Record's file name; None if it is not one."""
    match = _RECORD.fullmatch(name)
    return match.group(1) if match else None


def file_save_id(name: str) -> str | None:
    """The save id of any file of a save: Record, Index or data; None for a foreign name."""
    match = _FILE.fullmatch(name)
    return match.group(1) if match else None


def temporary_save_id(name: str) -> str | None:
    """The save id of a temporary, which is called after the object that it was to become; None for a foreign name."""
    return file_save_id(name.removeprefix(".")) if name.startswith(".") else None


def index_name(save_id: str, rank: int) -> str:
    """The Index of a rank."""
    return f"{save_id}-{rank}.index.json"


def data_name(save_id: str, rank: int, number: int, transforms: Sequence[str] = ()) -> str:
    """A data file of a rank. Its suffix says what other tools make of it, by the descriptors of its transforms."""
    if not transforms:
        suffix = "safetensors"
    else:
        suffix = "safetensors.zst" if [name.partition("/")[0] for name in transforms] == ["stream.zstd"] else "bin"
    return f"{save_id}-{rank}-{number}.{suffix}"


def is_descriptor(text: str) -> bool:
    """Whether ``text`` has the form of an extension's descriptor: ``name[@domain]/version``."""
    return _DESCRIPTOR.fullmatch(text) is not None


def belongs_to(name: str, save_id: str) -> bool:
    """Whether a file is of this save: Record, Index or data."""
    return name.startswith((f"{save_id}-", f"{save_id}."))
