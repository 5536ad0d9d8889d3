"""What the pipeline is told of a save, from its plan and its values."""

from __future__ import annotations

import platform
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec
import torch

from asyncdcp.errors import InvalidOption
from asyncdcp.format.blocks import BLOCK_BYTES, SLAB_BYTES, element_runs
from asyncdcp.format.image import FileImage
from asyncdcp.metadata import DTYPE_SIZES, USER_METADATA_LIMIT
from asyncdcp.names import data_name
from asyncdcp.pipeline.messages import FileJob, SaveJob
from asyncdcp.planning import SavePlan

_LEVELS = 100
"""So deep may metadata be nested, as may a state."""


def make_job(  # noqa: PLR0913  # each is a word of the verb, or follows from the checkpointer
    save_id: str,
    plan: SavePlan,
    values: Mapping[str, Any],
    deadline: float,
    *,
    overwrite: bool,
    metadata: dict[str, Any],
    transforms: Sequence[str] = (),
) -> SaveJob:
    """The job of one rank's save, as if it were the only one."""
    rank = plan.structure.rank
    names = [data_name(save_id, rank, number, transforms) for number in range(len(plan.images))]
    return SaveJob(
        save_id=save_id,
        rank=rank,
        world_size=1,
        files=[
            FileJob(name, image.size, _elements(plan, image) if transforms else [])
            for name, image in zip(names, plan.images, strict=True)
        ],
        slab_bytes=SLAB_BYTES,
        block_bytes=BLOCK_BYTES,
        plan=msgspec.Raw(plan.index_plan),
        values=msgspec.Raw(msgspec.json.encode(values)),
        tensors=len(plan.structure.tensors),
        tensor_bytes=plan.tensor_bytes,
        overwrite=overwrite,
        deadline=min(deadline, threading.TIMEOUT_MAX),  # messages are JSON, which has no infinity
        metadata=metadata,
        versions=dict(versions()),
        transforms=list(transforms),
    )


def _elements(plan: SavePlan, image: FileImage) -> list[tuple[int, int]]:
    """The element sizes of an image, for transforms that treat numbers as such."""
    tensors = plan.structure.tensors
    return element_runs(
        (begin, DTYPE_SIZES[tensors[chunk.tensor].dtype])
        for chunk, begin in (
            (plan.chunks[number], begin) for number, begin in zip(image.chunks, image.begins, strict=True)
        )
        if chunk.box.volume
    )


@cache
def versions() -> Mapping[str, str]:
    """Who writes: asyncdcp, torch and Python. Looked up once: to read a distribution's metadata takes a millisecond."""
    try:
        own = version("asyncdcp")
    except PackageNotFoundError:  # run from a source tree that is not installed
        own = "unknown"
    return {"asyncdcp": own, "torch": str(torch.__version__), "python": platform.python_version()}


def plain_json(option: str, mapping: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy of ``mapping`` as it will be read back; ``InvalidOption`` if JSON or a Record cannot carry it."""
    try:
        encoded = msgspec.json.encode(dict(mapping or {}))
        copied = msgspec.json.decode(encoded)
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidOption(f"{option} takes a mapping that JSON can carry: {error}") from error
    assert isinstance(copied, dict)
    if len(encoded) > USER_METADATA_LIMIT:
        raise InvalidOption(
            f"{option} has {len(encoded):,} bytes as JSON, and may have {USER_METADATA_LIMIT:,}: hold what is large in "
            "the state"
        )
    if _deeper(copied, _LEVELS):
        raise InvalidOption(f"{option} is nested deeper than {_LEVELS} levels")
    return copied


def _deeper(value: Any, levels: int) -> bool:
    """Whether lists and dicts are nested in each other deeper than so many ``levels``."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return inner is not None and (levels == 0 or any(_deeper(item, levels - 1) for item in inner))
