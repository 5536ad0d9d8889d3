"""Deleting a checkpoint so that a crash in the middle leaves it whole or absent, never torn.

The Record decides what is there, so it goes first, and durably, before any other file does: from then on the
directory holds no checkpoint, only leftovers, which the next writer or ``gc`` takes away. Records of commits that this
one had replaced go before it, since without it they would count again.
"""

from __future__ import annotations

from anyio import to_thread

from asyncdcp.errors import CheckpointGone, KeyUnavailable
from asyncdcp.extensions import ExtensionRegistry, Seals
from asyncdcp.metadata import RECORD_LIMIT, Record
from asyncdcp.names import file_save_id, record_name, record_save_id, temporary_save_id
from asyncdcp.runs.outcomes import Outcomes, read_outcomes
from asyncdcp.storage import Place, Storage


async def delete_checkpoint(place: Place, name: str, save_id: str, registry: ExtensionRegistry | None = None) -> None:
    """Deletes the commit ``save_id`` of sub-place ``name``, with all that it replaced. Safe to repeat after a crash.
    ``KeyUnavailable`` if its Record is encrypted, with a key that ``registry`` does not have: what it replaced is
    unknown then.

    Aborts stay: their names must not become free while a save that was given up might still try to commit. With the
    last file the sub-place goes, too.
    """
    survey = await place.survey(lambda child, file: child == name and record_save_id(file) is not None, RECORD_LIMIT)
    if name not in survey.children:
        return
    contents = survey.children[name]
    outcomes = await to_thread.run_sync(read_outcomes, contents, Seals(registry or ExtensionRegistry()))
    if save_id in outcomes.sealed:
        path = place.child(name).info.location
        raise KeyUnavailable(f"{path} is not deleted: {outcomes.sealed[save_id]}", path=path)
    own = outcomes.records.get(save_id)
    replaced = _replaced(own, outcomes)
    storage = place.child(name)
    if own is not None:
        if own.replaces:  # one that is gone already may come back by a loss of power, if nobody has synced that yet
            await storage.delete([record_name(each) for each in replaced])
            await storage.barrier()
        await storage.delete([record_name(save_id)])
        await storage.barrier()
    gone = {save_id, *replaced}
    await storage.delete([file for file in contents.objects if file_save_id(file) in gone])
    await place.discard(name, [each for each in contents.temporaries if temporary_save_id(each) in gone])


def _replaced(own: Record | None, outcomes: Outcomes) -> set[str]:
    """The commits that this one took the place of; an encrypted one is a commit, for only those are replaced."""
    named = set(own.replaces) if own else set()
    commits = {each for each in named & outcomes.records.keys() if outcomes.records[each].outcome == "commit"}
    return commits | named & outcomes.sealed.keys()


async def check_there(storage: Storage, save_id: str) -> None:
    """``CheckpointGone`` if the commit ``save_id``, which was there, has been deleted since."""
    if record_name(save_id) not in await storage.list():
        path = storage.info.location
        raise CheckpointGone(f"the checkpoint at {path} was deleted before it was read; read a newer one", path=path)
