"""Staging from accelerators, where there is one: order, exactness, pinned memory; what the host does, everywhere."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from asyncdcp import AsyncCheckpointer, MemoryStorage, SyncCheckpointer
from asyncdcp.errors import UsageError
from asyncdcp.planning import plan_save
from asyncdcp.staging import SlabCopier, StagingArena, accelerator, arenas
from asyncdcp.staging.accelerator import BounceBuffers, DeviceFence
from asyncdcp.state_dict.flatten import flatten
from asyncdcp.state_dict.structure import describe

MIB = 1 << 20


@pytest.fixture
def device() -> torch.device:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None:
        pytest.skip("there is no accelerator")
    return torch.device(found.type, torch.accelerator.current_device_index())


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("there is no CUDA device")
    return device


@pytest.fixture(params=[False, True], ids=["thread", "process"])
def checkpointer(request: pytest.FixtureRequest, tmp_path: Any) -> Iterator[SyncCheckpointer]:
    with SyncCheckpointer(process=request.param) as made:
        yield made


@pytest.fixture
def unpinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory cannot be registered, as in some containers."""
    monkeypatch.setattr(arenas, "register_host_memory", lambda *_: None)


def make_state(device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool, torch.complex64]
    return {
        **{str(dtype): torch.randint(0, 2, (300, 70), device=device).to(dtype) for dtype in dtypes},
        "float8": torch.randn(5000, device=device).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(2.5, device=device),
        "conjugated": torch.randn(20_000, dtype=torch.complex64, device=device).conj(),
        "negated": torch.randn(20_000, dtype=torch.complex64, device=device).conj().imag,
        "empty": torch.empty(0, 3, device=device),
        "transposed": torch.randn(400, 300, device=device).t(),
        "stepped": torch.randn(200, 300, device=device)[::2, 1::3],
        "expanded": torch.randn(200, 1, device=device).expand(200, 50),
        "large": torch.randn(5 * MIB, device=device),
        "small": [torch.full((n,), float(n), device=device) for n in range(1, 400)],
        "host": torch.arange(1000),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    flat_a, flat_b = (x.cpu().contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(flat_a, flat_b)


def busy(device: torch.device) -> Tensor:
    """Enqueues about half a second of work, at whose end the result is all ones."""
    matrix = torch.full((4096, 4096), 1 / 4096, device=device)
    result = torch.ones(4096, 4096, device=device)
    for _ in range(40):
        result = matrix @ result
    return result.round_()


def test_a_round_trip_is_exact(device: torch.device, checkpointer: SyncCheckpointer, tmp_path: Any) -> None:
    state = make_state(device)
    checkpointer.save(tmp_path / "a", state)
    loaded = checkpointer.load(tmp_path / "a")
    assert same(loaded, state)
    there = checkpointer.load(tmp_path / "a", device=device)
    assert there["large"].device == device
    assert same(there, state)


@pytest.mark.usefixtures("unpinned")
def test_a_round_trip_through_bounce_buffers(device: torch.device, checkpointer: SyncCheckpointer, tmp_path: Any):
    state = make_state(device)
    checkpointer.save(tmp_path / "a", state)
    assert same(checkpointer.load(tmp_path / "a"), state)


def test_a_save_sees_what_was_enqueued_before_it(device: torch.device, checkpointer: SyncCheckpointer, tmp_path: Any):
    for number, stream in enumerate([None, torch.Stream(device)]):
        if stream is not None:
            stream.wait_stream(torch.accelerator.current_stream(device))
        with stream or torch.accelerator.current_stream(device):
            tensor = busy(device)
            checkpointer.save(tmp_path / str(number), {"x": tensor})
        loaded = checkpointer.load(tmp_path / str(number))
        assert torch.equal(loaded["x"], torch.ones(4096, 4096))


def test_a_change_after_staged_is_not_seen(device: torch.device) -> None:
    with AsyncCheckpointer(process=False) as checkpointer:
        storage, tensor = MemoryStorage(), torch.ones(20 * MIB, device=device)
        save = checkpointer.save(storage, {"x": tensor})
        save.staged.result()
        tensor.zero_()
        save.result()
        assert bool((checkpointer.load(storage).result()["x"] == 1).all())


def test_a_guarded_step_waits(device: torch.device) -> None:
    model = nn.Linear(2000, 2000).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with AsyncCheckpointer(process=False) as checkpointer:
        checkpointer.guard(optimizer)
        for _ in range(3):
            before = model.weight.detach().clone()
            storage = MemoryStorage()
            save = checkpointer.save(storage, {"model": model})
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            save.result()
            assert torch.equal(checkpointer.load(storage).result()["model"]["weight"], before.cpu())


def test_a_load_in_place_fills_device_tensors(device: torch.device, checkpointer: SyncCheckpointer, tmp_path: Any):
    source = torch.randn(3000, 500)
    checkpointer.save(tmp_path / "a", {"plain": source, "strided": source, "cast": source})
    target = {
        "plain": torch.zeros(3000, 500, device=device),
        "strided": torch.zeros(500, 3000, device=device).t(),
        "cast": torch.zeros(3000, 500, dtype=torch.bfloat16, device=device),
    }
    kept = dict(target)
    target["plain"].copy_(busy(device)[:3000, :500])  # still under way when the load begins
    checkpointer.load(tmp_path / "a", target, cast="allow")
    with torch.Stream(device):  # which waits for nothing
        assert torch.equal(target["plain"].cpu(), source)
        assert torch.equal(target["strided"].cpu(), source)
        assert torch.equal(target["cast"].cpu(), source.bfloat16())
    assert all(target[name] is tensor for name, tensor in kept.items())


def test_nothing_is_saved_during_a_capture(cuda: torch.device) -> None:
    tensor = torch.ones(10, device=cuda)
    with AsyncCheckpointer(process=False) as checkpointer:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), pytest.raises(UsageError, match="CUDA graph"):
            tensor.add_(1)
            checkpointer.save(MemoryStorage(), {"x": tensor})
        checkpointer.save(MemoryStorage(), {"x": tensor}).result()


def test_the_arena_is_pinned_and_given_back(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    undone: list[int] = []

    def register(*args: Any) -> Callable[[], None] | None:
        undo = accelerator.register_host_memory(*args)
        assert undo is not None

        def unregister() -> None:
            undo()
            undone.append(1)

        return unregister

    monkeypatch.setattr(arenas, "register_host_memory", register)
    arena = StagingArena(2, MIB)
    assert not arena.slot(1).is_pinned()
    arena.pin(cuda)
    arena.pin(cuda)
    assert arena.bounce is None
    assert arena.slot(1).is_pinned()
    arena.close()
    assert len(undone) == 1


# ── without a device ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def host_pinned(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Memory that is asked for as pinned is ordinary; how often that was."""
    empty, count = torch.empty, [0]

    def ordinary(*args: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        count[0] += pin_memory
        return empty(*args, **options)

    monkeypatch.setattr(torch, "empty", ordinary)
    return lambda: count[0]


def test_a_bounce_buffer_is_used_again_and_moves_only_what_was_filled(host_pinned: Callable[[], int]) -> None:
    buffers, slot = BounceBuffers(100), torch.zeros(100, dtype=torch.uint8)
    for value in (1, 2):
        with buffers.around(slot, 60) as buffer:
            buffer.fill_(value)
        assert slot[:60].eq(value).all()
        assert slot[60:].eq(0).all()
    assert host_pinned() == 1
    with buffers.around(slot, 1), buffers.around(slot, 1):
        pass
    assert host_pinned() == 2


def test_a_copy_that_failed_moves_nothing_and_keeps_the_buffer(host_pinned: Callable[[], int]) -> None:
    buffers, slot = BounceBuffers(10), torch.zeros(10, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="no"), buffers.around(slot, 10) as buffer:
        buffer.fill_(1)
        raise RuntimeError("no")
    assert slot.eq(0).all()
    with buffers.around(slot, 10):
        pass
    assert host_pinned() == 1


def test_each_thread_has_a_buffer_of_its_own(host_pinned: Callable[[], int]) -> None:
    buffers, both, found = BounceBuffers(10), threading.Barrier(2), []

    def copy(slot: Tensor) -> None:
        with buffers.around(slot, 10) as buffer:
            both.wait(30)
            found.append(buffer.data_ptr())

    threads = [threading.Thread(target=copy, args=(torch.zeros(10, dtype=torch.uint8),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 2


def test_an_arena_that_cannot_be_pinned_bounces() -> None:
    arena = StagingArena(1, MIB)
    arena.pin(torch.device("xpu"))
    assert arena.bounce is not None
    arena.close()


def test_on_the_host_there_is_nothing_to_wait_for() -> None:
    described = describe(flatten({"x": torch.ones(5)}))
    fence = DeviceFence(described.sources)
    plan = plan_save(described.structure, slab_bytes=8 << 10)
    assert fence.devices == frozenset()
    assert not SlabCopier(plan, described.sources, fence).from_device(plan.slabs[0])
