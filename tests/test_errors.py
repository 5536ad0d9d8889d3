"""Every error can be pickled, with its fields: torch gathers those of all ranks so."""

from __future__ import annotations

import errno
import pickle
from typing import Any

import pytest

from asyncdcp import errors
from asyncdcp.errors import AsyncDCPError, ChecksumMismatch, StateMismatch, StorageError, WorkerCrashed


def kinds() -> list[type[AsyncDCPError]]:
    return [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AsyncDCPError)]


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_every_kind(kind: type[AsyncDCPError]) -> None:
    fields: dict[str, Any] = {"path": "run/step_9", "block": 3} if kind is ChecksumMismatch else {"path": "run/step_9"}
    check(kind("what happened", **fields))


@pytest.mark.parametrize(
    "error",
    [
        AsyncDCPError("m", path="p", rank=3, tensors=["a", "b"]),
        StorageError("m", path="p", errno=errno.ENOSPC),
        StateMismatch("m", missing=["a"], unexpected=["b"], mismatched=["c"]),
        WorkerCrashed("m", signal=9, save="id"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_all_fields(error: AsyncDCPError) -> None:
    error.add_note("a note")
    check(error)


def check(error: AsyncDCPError) -> None:
    made = pickle.loads(pickle.dumps(error))  # noqa: S301  # the test's own
    assert type(made) is type(error) and str(made) == str(error) and made.args == error.args
    assert vars(made) == vars(error)
    assert getattr(made, "errno", None) == getattr(error, "errno", None)
