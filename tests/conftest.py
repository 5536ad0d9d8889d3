"""Equality that forgives nothing: types, signs of zero, nan, order of keys, attributes."""

from __future__ import annotations

import io
import math
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

# torch's pools spin while they wait for work, one for every thread that calls it. Where as many processes run tests as
# there are cores, that costs more than all the tests. Read as torch is imported; programs that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from asyncdcp.engine import Engine
from tests.programs import Programs
from tests.work import LONG

settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")  # on a busy machine anything may take a second, and is no failure

Same = Callable[[Any, Any], bool]


def _same_float(a: float, b: float) -> bool:
    return ((math.isnan(a) and math.isnan(b)) or a == b) and math.copysign(1, a) == math.copysign(1, b)


def _same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    return bool(torch.equal(_bytes(a), _bytes(b)))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)  # a single element may have any stride


def _same_dict(a: dict[Any, Any], b: dict[Any, Any]) -> bool:
    if isinstance(a, defaultdict) and isinstance(b, defaultdict) and a.default_factory is not b.default_factory:
        return False
    attributes, others = getattr(a, "__dict__", {}), getattr(b, "__dict__", {})
    if (attributes or others) and not _same(attributes, others):
        return False
    return _same([*a], [*b]) and _same([*a.values()], [*b.values()])


def _canonical(items: Any) -> list[str]:
    return sorted(f"{type(item).__name__} {item!r}" for item in items)


def _same_deque(a: deque[Any], b: deque[Any]) -> bool:
    return a.maxlen == b.maxlen and _same([*a], [*b])


_BY_KIND: dict[type, Callable[[Any, Any], bool]] = {
    torch.Tensor: lambda a, b: _same_tensor(a.detach(), b.detach()),
    np.ndarray: lambda a, b: (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()),
    np.generic: lambda a, b: bool(a.dtype == b.dtype and a.tobytes() == b.tobytes()),
    dict: _same_dict,
    deque: _same_deque,
    list: lambda a, b: len(a) == len(b) and all(map(_same, a, b)),
    tuple: lambda a, b: len(a) == len(b) and all(map(_same, a, b)),
    set: lambda a, b: _canonical(a) == _canonical(b),
    frozenset: lambda a, b: _canonical(a) == _canonical(b),
    io.BytesIO: lambda a, b: b.tell() == 0 and a.getvalue() == b.getvalue(),
    slice: lambda a, b: _same([a.start, a.stop, a.step], [b.start, b.stop, b.step]),
    float: _same_float,
    complex: lambda a, b: _same_float(a.real, b.real) and _same_float(a.imag, b.imag),
}


def _same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    for kind, same in _BY_KIND.items():
        if isinstance(a, kind):
            return same(a, b)
    return bool(a == b) and getattr(a, "fold", 0) == getattr(b, "fold", 0) and repr(a) == repr(b)


@pytest.fixture(scope="session")
def same() -> Same:
    return _same


@pytest.fixture(scope="session")
def programs() -> Iterator[Programs]:
    """Starts programs in processes of their own, without their imports' cost."""
    made = Programs()
    yield made
    made.close()


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine("engine", exit_deadline=0, grace=LONG)
    yield made
    made.close(LONG)
