"""The link of a process group: its device and its owner; and the memory that blocks are copied to on a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from asyncdcp import PGTransport
from asyncdcp.errors import InvalidOption
from asyncdcp.staging import EagerBudget, Sources, devices
from asyncdcp.state_dict.flatten import flatten
from asyncdcp.state_dict.structure import describe
from asyncdcp.transport import blocks
from asyncdcp.transport.blocks import Stager
from asyncdcp.transport.link import group_link
from asyncdcp.transport.stream import plan_stream


class Group:
    """What a link asks of a process group when it is made."""

    def __init__(self, *kinds: str) -> None:
        self._device_types = kinds

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 2

    def send(self, *_: Any) -> None:
        raise AssertionError


@pytest.mark.parametrize("kinds", [("cuda",), ("cuda", "cpu")])
def test_a_device_is_the_current_one_of_who_makes_the_transport(
    kinds: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its threads have another: device 0, which is that of another rank."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)
    assert group_link(Group(*kinds), "cuda").device == torch.device("cuda", 3)
    assert group_link(Group(*kinds), "cuda:1").device == torch.device("cuda", 1)
    assert group_link(Group(*kinds), None).device == torch.device("cpu" if "cpu" in kinds else "cuda:3")
    assert group_link(Group(*kinds), "cpu").device == torch.device("cpu")


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(InvalidOption, match="there is no cuda here"):
        group_link(Group(), "cuda")


def test_a_group_has_one_transport_at_a_time() -> None:
    """What two of them say would mix: a message that meets a receive of another size makes gloo end the process."""
    group: Any = Group()
    with PGTransport(group, timeout=1):
        PGTransport(Group(), timeout=1).close()  # type: ignore[arg-type]  # as little of a group as is needed
        with pytest.raises(InvalidOption, match="another PGTransport, which is open, has this process group"):
            PGTransport(group, timeout=1)
    forgotten = PGTransport(group, timeout=1)
    del forgotten
    PGTransport(group, timeout=1).close()


class Streams:
    """A device with streams, of which the copies have one of their own."""

    asynchronous = True
    current = "default"

    def capturing(self) -> bool:
        return False

    def mark(self) -> str:
        return ""

    def wait(self, mark: str) -> None: ...

    def wait_on_host(self, mark: str) -> None: ...

    def side_stream(self) -> str:
        return "side"

    @contextmanager
    def on(self, stream: str) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


@pytest.mark.parametrize("whole", [False, True])
def test_memory_that_is_copied_to_is_of_the_stream_of_the_copies(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it could be what the training has freed and its kernels still use: nothing orders these and the copies."""
    work, taken = Streams(), []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            if name == "empty":
                taken.append(work.current)
            return getattr(torch, name)

    monkeypatch.setattr(devices, "is_on_host", lambda _: False)
    monkeypatch.setattr(devices, "work_on", lambda _: work)
    described = describe(flatten({"w": torch.arange(30.0), "t": torch.ones(40, 50).t()}))
    stager = Stager(plan_stream(described.structure, 4096), torch.device("cpu"), None, whole=whole, checksums=False)
    stager.begin(Sources(described.sources, [], (), EagerBudget(0)))
    monkeypatch.setattr(blocks, "torch", Watched())
    batch = stager.stage(1, shared=False)
    assert len(batch.blocks) == 3
    assert set(taken) == {"side"}
