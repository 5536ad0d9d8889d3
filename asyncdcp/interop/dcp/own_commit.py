"""asyncdcp's own format, written by the ranks of ``torch.distributed.checkpoint``: what the coordinator does.

results of all ranks ─▶ save id ─▶ checks ─▶ the files' names ─▶ indexes ─▶ barrier ─▶ Record
"""

from __future__ import annotations

import logging
import os
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import anyio
import msgspec
from anyio import to_thread
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from asyncdcp.checkpointer.jobs import versions
from asyncdcp.envelope import IndexHead, decode_index, digest, encode_index, encode_record
from asyncdcp.errors import AsyncDCPError, CorruptCheckpoint, SaveAborted
from asyncdcp.format.blocks import BLOCK_BYTES, SLAB_BYTES
from asyncdcp.interop.dcp.catalog import build, paths_of
from asyncdcp.interop.dcp.own_writing import Part
from asyncdcp.metadata import FileTable, IndexPlan, IndexRef
from asyncdcp.names import belongs_to, data_name, index_name, make_save_id, record_name
from asyncdcp.pipeline.commit import State
from asyncdcp.pipeline.messages import SaveJob
from asyncdcp.pipeline.records import abort_record, commit_unknown, live_commits, read_record, read_records
from asyncdcp.pipeline.settle import GiveUpSignal, Settlement
from asyncdcp.pipeline.union import Union, check_sizes, unite
from asyncdcp.pipeline.writer import delete_saves
from asyncdcp.planning import Structure
from asyncdcp.planning.save_plan import plan_save
from asyncdcp.state_dict.keys import encode_key
from asyncdcp.storage.files import translated
from asyncdcp.storage.local import LocalStorage

_STAGED = re.compile(r"__dcp_[0-9a-f]{32}_\d+\.part")

_MARKER = re.compile(r"__dcp_([0-9a-f]{20})\.begun")
"""It is there while files have names of the format, and no Record explains them yet."""

_logger = logging.getLogger("asyncdcp")


async def standing(storage: LocalStorage) -> bool:
    """Whether there is a commit."""
    return bool(live_commits(await read_records(storage, await storage.list())))


async def commit(
    storage: LocalStorage, metadata: Metadata, results: Sequence[Sequence[WriteResult]], *, overwrite: bool
) -> str:
    """Commits what all ranks have written, durably, then removes what it takes the place of; the save id. If it raises,
    what the ranks have written is removed, but for ``CommitUnknown``.
    """
    save_id = make_save_id(uuid.uuid4().hex, storage.info.location, 1)
    parts = [_part_of(result) for result in results]
    files = {
        file.name: data_name(save_id, rank, number)
        for rank, part in enumerate(parts)
        for number, file in enumerate(part.files)
    }
    indexes: dict[str, bytes] = {}
    try:
        indexes = await to_thread.run_sync(_indexes, save_id, parts, metadata)
        union = await to_thread.run_sync(_checked, indexes)
        await storage.put(_marker(save_id), b"")
        await to_thread.run_sync(_rename, storage.info.location, files)
        for name, data in indexes.items():
            await storage.put(name, data)
        await storage.barrier()
        check_sizes(union.files.values(), await storage.list())
    except BaseException:
        with anyio.CancelScope(shield=True):
            await storage.delete([*files, *files.values(), *indexes, _marker(save_id)])
        raise
    with anyio.CancelScope(shield=True):  # whoever cancels now is late: what is committed is not to be removed
        job = _job(save_id, union, len(parts), overwrite=overwrite)
        replaced = await _settle(job, storage, indexes, union)
        await _tidy(storage, replaced, save_id)
    return save_id


def _marker(save_id: str) -> str:
    return f"__dcp_{save_id}.begun"


def _part_of(results: Sequence[WriteResult]) -> Part:
    """What a rank has written; nothing, if the plan had nothing for it."""
    return results[0].storage_data if results else Part([], plan_save(Structure((), (), {}, None)).index_plan, {})


def _indexes(save_id: str, parts: Sequence[Part], metadata: Metadata) -> dict[str, bytes]:
    """Each rank's Index by its name. All have the whole tree, since only the coordinator knows it."""
    plans = [msgspec.json.decode(part.plan, type=IndexPlan) for part in parts]
    leaves: dict[str, _Leaf] = {}
    for plan, part in zip(plans, parts, strict=True):
        leaves |= {name: _Leaf({"t": name}) for name in plan.names}
        leaves |= {name: _Leaf({"v": name}, value) for name, value in part.values.items()}
    ordered = {name: leaves[name] for name in metadata.state_dict_metadata if name in leaves} | leaves
    tree = msgspec.Raw(msgspec.json.encode(_tree(ordered, metadata.planner_data)))
    made = {}
    for rank, (plan, part) in enumerate(zip(plans, parts, strict=True)):
        tables = [
            FileTable(data_name(save_id, rank, number), file.size, file.checksums)
            for number, file in enumerate(part.files)
        ]
        body = msgspec.json.encode(msgspec.structs.replace(plan, tree=tree))
        head = IndexHead(save_id, rank, BLOCK_BYTES, [])
        made[index_name(save_id, rank)] = encode_index(head, body, msgspec.json.encode(part.values), tables)
    return made


class _Leaf(list[Any]):
    """Stands for a tensor or a value in the nested state; it has the items of a value that is a list."""

    def __init__(self, node: dict[str, str], value: msgspec.Raw | None = None) -> None:
        content = None if value is None else msgspec.json.decode(value)
        super().__init__(content if isinstance(content, list) else ())
        self.node = node


def _tree(leaves: Mapping[str, _Leaf], planner_data: Any) -> Any:
    """The containers by the paths that the planner stored; a flat dict where they make no state."""
    try:
        return _node(build(paths_of(planner_data, leaves), leaves, "the plan"))
    except CorruptCheckpoint:
        return _node(dict(leaves))


def _node(state: Any) -> Any:
    if isinstance(state, _Leaf):
        return state.node
    if isinstance(state, list):
        return {"list": [_node(item) for item in state]}
    entries = state or {}  # None: an empty dict in a list, which DCP drops
    return {"dict": [[encode_key(key, "the plan") for key in entries], [_node(item) for item in entries.values()]]}


def _checked(indexes: Mapping[str, bytes]) -> Union:
    """Their union, in which nothing is missing."""
    return unite([decode_index(data, name) for name, data in indexes.items()])


def _rename(location: str, files: Mapping[str, str]) -> None:
    with translated("rename files in", location):
        for staged, name in files.items():
            os.rename(os.path.join(location, staged), os.path.join(location, name))


def _job(save_id: str, union: Union, world_size: int, *, overwrite: bool) -> SaveJob:
    """As much of a job as settling looks at."""
    nothing = msgspec.Raw(b"{}")
    return SaveJob(
        save_id=save_id,
        rank=0,
        world_size=world_size,
        files=[],
        slab_bytes=SLAB_BYTES,
        block_bytes=BLOCK_BYTES,
        plan=nothing,
        values=nothing,
        tensors=len(union.tensors) - len(union.values),
        tensor_bytes=union.tensor_bytes,
        overwrite=overwrite,
        deadline=0,
        metadata={},
        versions=dict(versions()),
    )


async def _settle(job: SaveJob, storage: LocalStorage, indexes: Mapping[str, bytes], union: Union) -> list[str]:
    """Claims the Record; the save ids that it replaces. If it is not a commit, removes the save's files and raises;
    ``CommitUnknown``, with all of them kept, where that cannot be told.
    """
    give_up = GiveUpSignal()
    name = index_name(job.save_id, 0)
    settlement = Settlement(job, storage, give_up, IndexRef(name, len(indexes[name]), digest(indexes[name])))
    settlement.stored_bytes = sum(file.stored_size for file in union.files.values())
    state = await settlement.run()
    if state is State.COMMITTED and settlement.record is not None:
        return settlement.record.replaces
    location, reason = storage.info.location, give_up.reason
    if state is State.UNKNOWN:
        cause = reason.error if reason else None
        raise commit_unknown(location, cause) from cause
    await storage.delete([*union.files, *indexes, _marker(job.save_id)])
    raise reason.error if reason else SaveAborted(f"the save to {location} was given up", path=location)


async def _tidy(storage: LocalStorage, replaced: Sequence[str], save_id: str) -> None:
    """Removes replaced checkpoints, and what is left of saves of which a rank failed, or the coordinator died."""
    try:
        await delete_saves(storage, replaced)
        names = await storage.list()
        begun = [match[1] for name in names if (match := _MARKER.fullmatch(name)) and match[1] != save_id]
        for dead in begun:
            await _remove_dead(storage, dead, names)
        staged = [name for name in names if _STAGED.fullmatch(name)]
        await storage.delete([*staged, *map(_marker, (*begun, save_id))])
    except (AsyncDCPError, OSError) as error:
        _logger.warning("files of an earlier save in %s could not be removed: %s", storage.info.location, error)


async def _remove_dead(storage: LocalStorage, save_id: str, names: Iterable[str]) -> None:
    """Removes the files of a save whose coordinator died before its commit, and makes sure that there will be none."""
    error = SaveAborted("the coordinator died before the commit, and a later save has cleaned up after it")
    abort = abort_record(save_id, (0, 1), error, dict(versions()))
    won = await storage.claim(record_name(save_id), await to_thread.run_sync(encode_record, abort))
    if won or (await read_record(storage, save_id)).outcome == "abort":
        own = record_name(save_id)
        await storage.delete([name for name in names if belongs_to(name, save_id) and name != own])
