from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What a killed process cannot clean up is logged, thousands of times."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)
