"""Overlap that is safe: under a guard a save is of one moment; without one, a change during staging is caught."""

from __future__ import annotations

import gc
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from asyncdcp import AsyncCheckpointer, MemoryStorage, Options
from asyncdcp.errors import Cancelled, InvalidOption, TornSnapshotError
from asyncdcp.staging import SlabCopier


class Counting(torch.optim.Optimizer):
    """Sets every parameter and its state to the number of steps taken, past all version counters."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.steps = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure is ever given
        """Everything that is saved says which step it is of."""
        self.steps += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.fill_(self.steps)
                self.state[parameter].setdefault("moment", torch.empty_like(parameter)).data.fill_(self.steps)


@pytest.fixture
def checkpointer() -> Iterator[AsyncCheckpointer]:
    with AsyncCheckpointer(Options(staging_bytes=64 << 20), process=False) as made:
        yield made


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Copies wait until the gate is opened."""
    opened, copy = threading.Event(), SlabCopier.copy

    def late(self: SlabCopier, *args: Any) -> None:
        assert opened.wait(30)
        copy(self, *args)

    monkeypatch.setattr(SlabCopier, "copy", late)
    yield opened.set
    opened.set()


def test_every_guarded_save_is_of_one_step(checkpointer: AsyncCheckpointer) -> None:
    model = nn.ModuleList(nn.Linear(500, 500) for _ in range(8))
    average = torch.zeros(1000)
    optimizer = Counting(model.parameters())
    optimizer.step()
    state = {"model": model, "optimizer": optimizer, "average": average}
    saves = []
    with checkpointer.guard(optimizer):
        for _ in range(10):
            optimizer.step()
            average.fill_(optimizer.steps)
            saves.append((optimizer.steps, storage := MemoryStorage(), checkpointer.save(storage, state)))
    for step, storage, save in saves:
        save.result()
        loaded = checkpointer.load(storage).result()
        tensors = [loaded["average"], *loaded["model"].values()]
        tensors += [moments["moment"] for moments in loaded["optimizer"]["state"].values()]
        assert len(tensors) == 33
        assert {value for tensor in tensors for value in tensor.unique().tolist()} == {step}


def test_a_step_waits_for_staging_and_nothing_else_does(
    checkpointer: AsyncCheckpointer, gate: Callable[[], None]
) -> None:
    model = nn.Linear(10, 10)
    optimizer = Counting(model.parameters())
    guard = checkpointer.guard(optimizer)
    save = checkpointer.save(MemoryStorage(), {"model": model})
    stepped = threading.Event()

    def step() -> None:
        optimizer.step()
        stepped.set()

    thread = threading.Thread(target=step)
    thread.start()
    model(torch.ones(10)).sum().backward()
    assert not save.staged.done()
    assert not stepped.is_set()
    assert optimizer.steps == 0
    gate()
    assert stepped.wait(30)
    thread.join()
    assert guard.waited > 0
    save.result()


def test_a_step_that_waits_too_long_drops_the_save(gate: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncdcp.checkpointer.handles._STOP_SECONDS", 0.05)
    model = nn.Linear(10, 10)
    optimizer = Counting(model.parameters())
    with AsyncCheckpointer(Options(guard_deadline=0.05), process=False) as checkpointer:
        checkpointer.guard(optimizer)
        save = checkpointer.save(MemoryStorage(), {"model": model})
        optimizer.step()
        assert optimizer.steps == 1
        gate()
        assert isinstance(save.exception(), Cancelled)


def test_a_dropped_checkpointer_still_holds_steps_back_for_what_it_has_begun(
    gate: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncdcp.checkpointer.handles._STOP_SECONDS", 0.05)
    optimizer = Counting([parameter := nn.Parameter(torch.zeros(9))])
    checkpointer = AsyncCheckpointer(Options(guard_deadline=0.05), process=False)
    guard = checkpointer.guard(optimizer)
    save, engine = checkpointer.save(MemoryStorage(), {"x": parameter}), checkpointer._engine
    with pytest.warns(ResourceWarning, match="unclosed"):
        del checkpointer
        gc.collect()
    optimizer.step()
    assert guard.waited >= 0.05
    gate()
    assert isinstance(save.exception(), Cancelled)
    engine.close(20)


def test_a_removed_guard_and_a_closed_checkpointer_hold_nothing(gate: Callable[[], None]) -> None:
    optimizer = Counting(nn.Linear(2, 2).parameters())
    with AsyncCheckpointer(process=False) as checkpointer:
        checkpointer.guard(optimizer).remove()
        save = checkpointer.save(MemoryStorage(), {"x": torch.ones(3)})
        optimizer.step()
        assert not save.staged.done()
        checkpointer.guard(optimizer)
        gate()
    optimizer.step()


def test_a_forked_child_is_not_held_back(checkpointer: AsyncCheckpointer, gate: Callable[[], None]) -> None:
    parameter = nn.Parameter(torch.zeros(9))
    optimizer = Counting([parameter])
    checkpointer.guard(optimizer)
    handle = checkpointer.save(MemoryStorage(), {"w": parameter})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: this process has threads
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(120)
            optimizer.step()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    gate()
    handle.result(30)


def test_a_load_into_what_is_being_saved_waits_for_its_staging(
    checkpointer: AsyncCheckpointer, request: pytest.FixtureRequest
) -> None:
    old, new, w = MemoryStorage("old"), MemoryStorage("new"), torch.zeros(9)
    checkpointer.save(old, {"w": w}).result(30)
    opened = request.getfixturevalue("gate")  # from here on copies wait
    w.fill_(1)
    save = checkpointer.save(new, {"w": w})
    load = checkpointer.load(old, {"w": w})
    assert not load.wait(0.2)
    opened()
    load.result(30)
    assert w.sum() == 0
    save.result(30)
    assert checkpointer.load(new).result(30)["w"].sum() == 9


def test_wait_staged(checkpointer: AsyncCheckpointer, gate: Callable[[], None]) -> None:
    checkpointer.wait_staged().result()
    saves = [checkpointer.save(MemoryStorage(), {"x": torch.ones(3)}) for _ in range(3)]
    waiting = checkpointer.wait_staged()
    assert not waiting.done()
    gate()
    waiting.result()
    assert all(save.staged.done() for save in saves)


def test_what_no_guard_protects_is_cloned_before_save_returns(
    checkpointer: AsyncCheckpointer, gate: Callable[[], None]
) -> None:
    norm = nn.BatchNorm1d(4)
    with checkpointer.guard(torch.optim.SGD(norm.parameters())):
        storage = MemoryStorage()
        before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
        save = checkpointer.save(storage, {"norm": norm})
        norm(torch.randn(8, 4))  # moves the statistics while they are being saved
        gate()
        save.result()
    loaded = checkpointer.load(storage).result()["norm"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in before.items())


def test_beyond_the_budget_a_change_is_caught(gate: Callable[[], None]) -> None:
    norm = nn.BatchNorm1d(4)
    with AsyncCheckpointer(Options(eager_bytes=0), process=False) as checkpointer:
        checkpointer.guard(torch.optim.SGD(norm.parameters()))
        save = checkpointer.save(MemoryStorage(), {"norm": norm})
        norm.running_mean.add_(1)  # type: ignore[union-attr]  # it is there
        gate()
        with pytest.raises(TornSnapshotError) as caught:
            save.result()
        assert caught.value.tensors == ("norm.running_mean",)


def test_a_change_without_waiting_fails_the_save_and_names_the_tensors(
    checkpointer: AsyncCheckpointer, gate: Callable[[], None]
) -> None:
    model = nn.Linear(300, 300)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.ones(300)).sum().backward()
    storage = MemoryStorage()
    staged, committed = checkpointer.save(storage, {"model": model, "x": torch.ones(5)})
    optimizer.step()
    gate()
    with pytest.raises(TornSnapshotError, match=r"model\.weight, model\.bias; wait for staged") as caught:
        committed.result()
    assert caught.value.tensors == ("model.weight", "model.bias")
    with pytest.raises(TornSnapshotError):
        staged.result()
    checkpointer.save(storage, {"model": model}, overwrite=True).result()


def test_what_cannot_be_guarded_is_refused(checkpointer: AsyncCheckpointer) -> None:
    with pytest.raises(InvalidOption, match="register_step_pre_hook"):
        checkpointer.guard(nn.Linear(2, 2))  # type: ignore[arg-type]  # that is the point


def test_save_keys_stores_a_part(checkpointer: AsyncCheckpointer) -> None:
    storage = MemoryStorage()
    weight = torch.ones(2)
    state = {"model": {"w": weight, "tied": weight, "b": torch.zeros(1)}, "step": 3, "l": [{"x": 1}, {"y": 2}]}
    result = checkpointer.save(storage, state, keys=["*.tied", "l.0.*"]).result()
    assert result.tensors == 1
    loaded = checkpointer.load(storage).result()
    assert loaded == {"model": {"tied": loaded["model"]["tied"]}, "l": [{"x": 1}, {"y": 2}]}
    assert torch.equal(loaded["model"]["tied"], weight)


@pytest.mark.parametrize("keys", [["nothing*"], ["model", "modle.*"], "model.*"])
def test_keys_that_make_no_sense_are_refused(checkpointer: AsyncCheckpointer, keys: Any) -> None:
    with pytest.raises(InvalidOption, match=r"keys=\['(nothing|modle\.)\*'\] match nothing|keys takes"):
        checkpointer.save(MemoryStorage(), {"model": torch.ones(1)}, keys=keys)


def test_every_key_may_match_what_another_does_too(checkpointer: AsyncCheckpointer) -> None:
    storage, scaler = MemoryStorage(), torch.amp.GradScaler("cpu", enabled=False)  # whose state is empty
    state = {"l": [{"x": 1}, {"y": 2}], "scaler": scaler, "b": 3}
    checkpointer.save(storage, state, keys=["l.*", "l.1.y", "*.x", "scaler", "scaler.*"]).result()
    assert checkpointer.load(storage).result() == {"l": state["l"], "scaler": {}}


def test_pickles_go_both_ways_where_both_allow_them(checkpointer: AsyncCheckpointer) -> None:
    storage = MemoryStorage()
    checkpointer.save(storage, {"f": nn.ReLU, "x": 1}, allow_pickle=True).result()
    assert checkpointer.load(storage, allow_pickle=True).result() == {"f": nn.ReLU, "x": 1}
    with pytest.raises(Exception, match="allow_pickle=True"):
        checkpointer.load(storage).result()
