"""A failure that nobody has looked at is never lost, and one that somebody has is never raised twice."""

from __future__ import annotations

import asyncio
import errno
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from asyncdcp import AsyncCheckpointer, MemoryStorage, Options
from asyncdcp.errors import (
    StorageError,
    UnseenFailure,
)
from tests.checkpointer.conftest import SMALL, STATE

# ── failures that nobody has looked at ──


def failing(faulty: Any, name: str = "faulty", after: str = "write") -> Any:
    storage = faulty(name)
    storage.errors[after, 1] = OSError(errno.EIO, "broken")
    return storage


def fail(checkpointer: AsyncCheckpointer, storage: Any) -> Any:
    """A save that has failed, and that nobody has looked at."""
    handle = checkpointer.save(storage, SMALL)
    assert handle.committed.wait(30)
    return handle


@pytest.mark.parametrize("verb", ["save", "load", "prepare", "close"])
def test_raised_at_the_next_verb_once(faulty: Any, verb: str) -> None:
    checkpointer = AsyncCheckpointer(process=False)
    fail(checkpointer, failing(faulty, "a place"))
    call: dict[str, Callable[[], object]] = {
        "save": lambda: checkpointer.save(MemoryStorage(), SMALL),
        "load": lambda: checkpointer.load(MemoryStorage()),
        "prepare": lambda: checkpointer.prepare(SMALL),
        "close": checkpointer.close,
    }
    with pytest.raises(UnseenFailure, match="an earlier save to a place failed") as caught:
        call[verb]()
    assert isinstance(caught.value.__cause__, StorageError)
    assert caught.value.path == "a place"
    checkpointer.close()


def test_several_are_all_named(faulty: Any) -> None:
    checkpointer = AsyncCheckpointer(process=False)
    storages = [failing(faulty, name) for name in ("one", "two", "three")]
    gate = storages[0].gate("list")  # else it might have failed, and come up, before all are begun
    handles = [checkpointer.save(storage, SMALL) for storage in storages]
    gate.release.set()
    handles[1].exception()
    assert handles[2].committed.wait(30)
    with pytest.raises(UnseenFailure, match="three") as caught:
        checkpointer.close()
    [note] = caught.value.__notes__
    assert note == f"an earlier save to one failed and nobody looked at it: {handles[0].exception()}"


@pytest.mark.parametrize("look", ["result", "exception", "staged", "await", "callback"])
def test_not_raised_once_looked_at(checkpointer: AsyncCheckpointer, faulty: Any, look: str) -> None:
    storage = failing(faulty, after="create" if look == "staged" else "write")
    handle = checkpointer.save(storage, STATE if look == "staged" else SMALL)
    if look == "callback":
        handle.add_done_callback(lambda future: future.exception())
        assert handle.committed.wait(30)
        flushed = threading.Event()
        handle.add_done_callback(lambda _: flushed.set())
        assert flushed.wait(30)
    elif look == "staged" and isinstance(handle.staged.exception(), StorageError):
        assert handle.committed.wait(30)
    elif look == "await":

        async def wait() -> None:
            with pytest.raises(StorageError):
                await handle

        asyncio.run(wait())
    else:
        handle.exception()
    checkpointer.prepare(SMALL).result()


async def test_a_failure_that_a_task_waits_for_is_the_tasks(checkpointer: AsyncCheckpointer, faulty: Any) -> None:
    """Even where the next verb comes first, before the loop has come to run that task."""
    handle = checkpointer.save(failing(faulty), SMALL)

    async def wait() -> None:
        with pytest.raises(StorageError):
            await handle

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    handle.committed.wait(30)
    checkpointer.prepare(SMALL)
    await task
    checkpointer.prepare(SMALL)


async def test_a_failure_whose_waiter_was_cancelled_is_raised(faulty: Any) -> None:
    checkpointer = AsyncCheckpointer(process=False)
    handle = checkpointer.save(failing(faulty), SMALL)

    async def wait() -> None:
        await handle

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    handle.committed.wait(30)
    task.cancel()
    with pytest.raises((asyncio.CancelledError, StorageError)) as caught:
        await task
    if isinstance(caught.value, StorageError):  # the outcome was faster than the cancellation
        await checkpointer.aclose()
    else:
        with pytest.raises(UnseenFailure):
            await checkpointer.aclose()


def test_on_error_warn_and_callable(faulty: Any) -> None:
    checkpointer = AsyncCheckpointer(Options(on_error="warn"), process=False)
    fail(checkpointer, failing(faulty, "one"))
    with pytest.warns(RuntimeWarning, match="save to one failed") as caught:
        checkpointer.prepare(SMALL).result()
    assert caught[0].filename == __file__
    fail(checkpointer, failing(faulty, "two"))
    with pytest.warns(RuntimeWarning, match="save to two failed"):
        checkpointer.close()

    errors: list[BaseException] = []
    checkpointer = AsyncCheckpointer(Options(on_error=errors.append), process=False)
    fail(checkpointer, failing(faulty))
    checkpointer.close()
    assert [type(error) for error in errors] == [StorageError]


def test_close_does_not_mask_an_error_of_the_block(faulty: Any) -> None:
    with pytest.raises(KeyError) as caught, AsyncCheckpointer(process=False) as checkpointer:
        fail(checkpointer, failing(faulty, "a place"))
        raise KeyError("the block's own")
    assert any("a place" in note for note in caught.value.__notes__)

    async def main() -> None:
        async with AsyncCheckpointer(process=False) as checkpointer:
            fail(checkpointer, failing(faulty, "a place"))
            raise KeyError("the block's own")

    with pytest.raises(KeyError):
        asyncio.run(main())

    def refuse(error: BaseException) -> None:
        raise ZeroDivisionError

    with pytest.raises(KeyError), AsyncCheckpointer(Options(on_error=refuse), process=False) as checkpointer:
        fail(checkpointer, failing(faulty))
        raise KeyError("the block's own")


def test_a_failure_without_another_error_is_raised_at_the_end_of_the_block(faulty: Any) -> None:
    with pytest.raises(UnseenFailure), AsyncCheckpointer(process=False) as checkpointer:
        fail(checkpointer, failing(faulty))


def test_warnings_stay_quiet_where_all_is_well() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with AsyncCheckpointer(process=False) as checkpointer:
            checkpointer.save(MemoryStorage(), SMALL)


def test_it_is_logged_where_the_close_that_would_raise_it_is_cancelled(
    faulty: Any, caplog: pytest.LogCaptureFixture
) -> None:
    storage = faulty()
    storage.errors["barrier", 1] = StorageError("the disk is gone", errno=errno.EIO)
    gate = storage.gate("barrier", 1)

    async def main() -> None:
        checkpointer = AsyncCheckpointer(process=False)
        checkpointer.save(storage, SMALL)
        closing = asyncio.ensure_future(checkpointer.aclose())
        await asyncio.to_thread(gate.wait_begun)
        closing.cancel()
        await asyncio.sleep(0)
        gate.release.set()
        with pytest.raises(asyncio.CancelledError):
            await closing

    asyncio.run(main())
    assert "the disk is gone" in caplog.text
