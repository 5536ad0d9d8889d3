"""One process group of one rank, so that DCP does not warn at every call."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from tests.interop.dcp.states import State, training_state


@pytest.fixture(scope="module")  # not longer: other tests of the process have groups of their own
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _in_world(world: None) -> None:
    pass


@pytest.fixture
def state() -> State:
    return training_state()
