"""What the trainer's side and the pipeline say to each other about one save. Plain data, the same within one process
and between two.

trainer → pipeline   SaveJob, then SlabReady …
pipeline → trainer   one Saved, or an error

What else there is to say is a call within one process, and a message of ``worker/protocol.py`` between two.
"""

from __future__ import annotations

from typing import Any

import msgspec

from asyncdcp.metadata import RunStamp


class FileJob(msgspec.Struct, frozen=True):
    """A data file to write: its name and its size before transforms. ``elements`` are ``blocks.element_runs``, which
    only transforms look at.
    """

    name: str
    size: int
    elements: list[tuple[int, int]] = []


class SaveJob(msgspec.Struct, frozen=True):
    """Everything the pipeline needs to know of a save, but the bytes.

    ``plan`` and ``values`` are encoded parts of the Index. ``metadata`` is the user's, for the Record, as is
    ``run``. ``deadline`` is in seconds from when the job is begun. ``transforms`` are descriptors, in the order in
    which they are applied. ``keys`` are globs of which each has to match something that some rank has saved.
    """

    save_id: str
    rank: int
    world_size: int
    files: list[FileJob]
    slab_bytes: int
    block_bytes: int
    plan: msgspec.Raw
    values: msgspec.Raw
    tensors: int
    tensor_bytes: int
    overwrite: bool
    deadline: float
    metadata: dict[str, Any]
    versions: dict[str, str]
    run: RunStamp | None = None
    transforms: list[str] = []
    keys: list[str] = []


class SlabReady(msgspec.Struct, frozen=True, tag=True):
    """Slab ``number`` of file ``file`` lies in arena slot ``slot``, ``length`` bytes long. The slot is the pipeline's
    until it gives it back.
    """

    file: int
    number: int
    slot: int
    length: int


class Saved(msgspec.Struct, frozen=True, tag=True):
    """The save is committed and durable. ``seconds`` are by stage of the pipeline, as ``trace.Trace.seconds``."""

    save_id: str
    stored_bytes: int
    replaced: list[str]
    filesystem: str
    seconds: dict[str, float]
