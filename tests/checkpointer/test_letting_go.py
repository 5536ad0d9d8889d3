"""What saves, and loads that failed, leave in memory where the garbage collector is off, as some trainers have it."""

from __future__ import annotations

import weakref
from contextlib import suppress
from typing import Any

import anyio
import pytest
import torch

from asyncdcp import MemoryStorage
from asyncdcp.checkpointer import loading
from asyncdcp.errors import AsyncDCPError, Cancelled, CheckpointNotFound, ChecksumMismatch, StorageError
from asyncdcp.pipeline import reader
from asyncdcp.state_dict.targets import new_tensors
from asyncdcp.storage.files import io_buffer
from tests.checkpointer.conftest import STATE, FaultyStorage, Gate, Opened, wait_until

pytestmark = pytest.mark.usefixtures("uncollected")


class Refusing:
    """A Stateful that takes nothing."""

    def state_dict(self) -> dict[str, Any]:
        return {"w": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise ValueError("not that")


@pytest.mark.parametrize("how", ["nothing there", "mismatch", "damaged", "refused", "broken"])
def test_a_load_that_failed_lets_the_state_go_with_its_error(opened: Opened, faulty: Any, how: str) -> None:
    checkpointer, storage, state = opened(), faulty(), dict[str, Any](w=torch.zeros_like(STATE["w"]))
    saved = STATE | {"s": Refusing()} if how == "refused" else STATE
    if how != "nothing there":
        checkpointer.save(storage, saved).result()
    if how == "mismatch":
        state["more"] = 1
    elif how == "damaged":
        _damage(storage)
    elif how == "refused":
        state["s"] = Refusing()
    elif how == "broken":
        storage.errors["get", 1] = RuntimeError("a bug in somebody's storage")
    gone = weakref.ref(state["w"])
    future = checkpointer.load(storage, state)
    del state
    error = future.exception()
    assert isinstance(error, AsyncDCPError)
    storage.errors.clear()
    del future, error
    wait_until(lambda: gone() is None)


def test_a_future_that_has_raised_its_error_does_not_live_on_in_it(opened: Opened, faulty: Any) -> None:
    future = opened().load(faulty())
    gone = weakref.ref(future)
    with suppress(CheckpointNotFound):
        future.result()
    del future
    wait_until(lambda: gone() is None)


@pytest.mark.parametrize("how", ["anew", "assigned"])
def test_the_error_of_a_load_holds_none_of_the_tensors_that_were_made_for_it(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Or a run's restore would have those of each damaged checkpoint, until one is whole."""
    made = list[Any]()

    def watched(*args: Any) -> Any:
        tensors = new_tensors(*args)
        made.extend(map(weakref.ref, tensors.values()))
        return tensors

    checkpointer, storage = opened(), FaultyStorage()
    checkpointer.save(storage, STATE).result()
    _damage(storage)
    monkeypatch.setattr(loading, "new_tensors", watched)
    into = {"w": torch.zeros_like(STATE["w"])} if how == "assigned" else None
    error = checkpointer.load(storage, into, assign=how == "assigned").exception()
    assert isinstance(error, ChecksumMismatch)
    wait_until(lambda: all(tensor() is None for tensor in made))
    assert made


def test_a_load_that_was_cancelled_holds_no_memory_that_it_read_to(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffers, gate = list[Any](), Gate()

    def watched(size: int) -> memoryview:
        buffer = io_buffer(size)
        buffers.append(weakref.ref(buffer))
        return buffer

    async def forever(*_: Any) -> None:
        gate.begun.set()
        await anyio.sleep_forever()

    checkpointer, storage = opened(), MemoryStorage()
    checkpointer.save(storage, STATE).result()
    monkeypatch.setattr(reader, "io_buffer", watched)
    monkeypatch.setattr(reader, "_fetch", forever)
    future = checkpointer.load(storage)
    gate.wait_begun()
    future.cancel()
    assert isinstance(future.exception(), Cancelled)
    wait_until(lambda: all(buffer() is None for buffer in buffers))
    assert buffers


@pytest.mark.parametrize("how", ["done", "list", "write", "finish", "cancelled"])
def test_a_save_lets_its_storage_go(opened: Opened, how: str) -> None:
    """With the handle, which the checkpointer has until its next verb, and the error."""
    checkpointer, storage = opened(), FaultyStorage()
    gate = storage.gate("write", 1) if how == "cancelled" else None
    storage.errors[how, 1] = StorageError("broken")
    handle = checkpointer.save(storage, STATE)
    if gate is not None:
        gate.wait_begun()
        handle.cancel()
        gate.release.set()
    failed = handle.exception()
    assert (failed is None) == (how == "done")
    storage.errors.clear()
    gone = weakref.ref(storage)
    del storage, handle, failed
    checkpointer.wait_staged().result()
    wait_until(lambda: gone() is None)


def _damage(storage: Any) -> None:
    name = next(name for name in storage.names if name.endswith(".safetensors"))
    storage.names[name] = storage.names[name][:-9] + bytes(9)
