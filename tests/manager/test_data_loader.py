"""Any Stateful goes into a state; torchdata's data loader is one."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from tests.manager.conftest import Opened


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it
def test_a_stateful_data_loader_goes_on_where_it_was(opened: Opened) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaders = pytest.importorskip("torchdata.stateful_dataloader")

    def make() -> Any:
        generator = torch.Generator().manual_seed(0)
        return loaders.StatefulDataLoader(list(range(20)), batch_size=2, shuffle=True, generator=generator)

    loader = make()
    batches = iter(loader)
    seen = [next(batches).tolist() for _ in range(3)]
    with opened() as manager:
        manager.save(3, {"loader": loader, "weight": torch.ones(1)}).result()
    rest = [batch.tolist() for batch in batches]
    assert len(seen + rest) == 10

    other = make()
    restored = opened().restore_latest({"loader": other, "weight": torch.zeros(1)}).result()
    assert restored is not None and restored.step == 3
    assert [batch.tolist() for batch in other] == rest
