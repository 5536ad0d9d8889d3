"""What a save finds there already, and how its claim ends."""

from __future__ import annotations

import pytest

from asyncdcp.envelope import encode_record
from asyncdcp.errors import CheckpointExists, CommitUnknown, PeerFailed, SaveAborted, StorageError
from asyncdcp.metadata import Record
from asyncdcp.names import belongs_to, data_name, index_name, record_name
from asyncdcp.storage import MemoryStorage
from tests.pipeline.forge import OTHER, SAVE, STATE, read_all, save
from tests.pipeline.staged import ARRAYS, Staged, fails, nothing_is_left, record_in

# ── what is there already ───────────────────────────────────────────────────────────────────────────────────────────


async def test_an_existing_checkpoint_is_refused_and_nothing_written() -> None:
    storage = Staged()
    await save(storage, save_id=OTHER)
    before = dict(storage._objects)
    storage.calls.clear()
    with pytest.raises(CheckpointExists, match="there"):
        await save(storage, ARRAYS)
    assert storage._objects == before and storage.calls == ["list"]


async def test_one_that_came_meanwhile_is_refused_too() -> None:
    storage, other = Staged(), MemoryStorage()
    await save(other, save_id=OTHER)

    async def meanwhile(_: int) -> None:
        storage._objects.update(other._objects)

    storage.hooks = {"barrier": meanwhile}
    with pytest.raises(CheckpointExists):
        await save(storage, ARRAYS)
    nothing_is_left(storage)
    storage.hooks = {}
    assert (await read_all(storage)).keys() == STATE.keys()


async def test_overwriting_deletes_after_the_commit_and_the_record_last() -> None:
    storage = Staged()
    await save(storage, save_id=OTHER)
    deleted: list[bool] = []

    async def committed(_: int) -> None:
        deleted.append(record_in(storage) is not None and record_name(OTHER) in storage._objects)

    storage.hooks = {"delete": committed}
    saved = await save(storage, ARRAYS, overwrite=True)
    assert saved.replaced == [OTHER] and deleted == [True, True]
    assert all(belongs_to(name, SAVE) for name in storage._objects)
    assert (await read_all(storage)).keys() == ARRAYS.keys()


@pytest.mark.parametrize("error", [StorageError("EIO"), TypeError("a bug"), FileNotFoundError("gone")], ids=repr)
async def test_a_commit_stands_even_if_what_it_replaced_cannot_be_deleted(error: Exception) -> None:
    storage = Staged(delete=fails(error))
    await save(storage, save_id=OTHER)
    assert (await save(storage, ARRAYS, overwrite=True)).replaced == [OTHER]
    assert (await read_all(storage)).keys() == ARRAYS.keys()
    third = "f" * 20
    assert set((await save(storage, {}, overwrite=True, save_id=third)).replaced) == {SAVE, OTHER}
    assert all(belongs_to(name, third) for name in storage._objects)


# ── the claim ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_claim_that_is_refused() -> None:
    storage = Staged(claim_commit=fails(StorageError("no space")))
    with pytest.raises(StorageError, match="no space"):
        await save(storage, ARRAYS)
    nothing_is_left(storage)
    record = record_in(storage)
    assert record and record.outcome == "abort"


async def test_no_claim_at_all_and_the_save_has_failed_for_sure() -> None:
    storage = Staged(claim_commit=fails(StorageError("full")), claim_abort=fails(StorageError("full")))
    with pytest.raises(StorageError, match="full") as caught:
        await save(storage, ARRAYS)
    assert not isinstance(caught.value, CommitUnknown) and not storage._objects


async def test_a_claim_without_an_answer_that_was_won() -> None:
    storage = Staged(claimed=fails(CommitUnknown("no answer")))
    assert (await save(storage, ARRAYS)).save_id == SAVE


async def test_a_claim_without_an_answer_that_was_not() -> None:
    storage = Staged(claim_commit=fails(CommitUnknown("no answer")))
    with pytest.raises(SaveAborted):
        await save(storage, ARRAYS)
    nothing_is_left(storage)


async def test_a_claim_that_nobody_can_tell_of_keeps_the_files() -> None:
    storage = Staged(claim_commit=fails(CommitUnknown("no answer")), claim_abort=fails(StorageError("down")))
    with pytest.raises(CommitUnknown, match="cannot be told"):
        await save(storage, ARRAYS)
    assert set(storage._objects) == {data_name(SAVE, 0, 0), index_name(SAVE, 0)}


async def test_a_peer_s_abort() -> None:
    storage = Staged()
    abort = Record(save_id=SAVE, outcome="abort", time=0.0, world_size=2, versions={}, rank=1, cause="its own")
    storage._objects[record_name(SAVE)] = encode_record(abort)
    with pytest.raises(PeerFailed, match="rank 1 gave the save up: its own") as caught:
        await save(storage, ARRAYS, world_size=2)
    assert caught.value.rank == 1
    nothing_is_left(storage)
