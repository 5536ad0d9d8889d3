"""Every error can be pickled, with its fields: torch gathers those of all ranks so."""

from __future__ import annotations

import errno
import pickle
import re
from typing import Any

import pytest

from asyncdcp import errors
from asyncdcp.errors import (
    AmbiguousCheckpoint,
    AsyncDCPError,
    ChecksumMismatch,
    CorruptCheckpoint,
    KeyUnavailable,
    StateMismatch,
    StorageError,
    StorageFull,
    UnsupportedFormat,
    WorkerCrashed,
    reading,
    storage_error,
)


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


@pytest.mark.parametrize(
    ("error", "said", "path"),
    [
        (ChecksumMismatch("f: torn", path="f", block=0), "is damaged: f: torn. Load an earlier one", "/run/1/f"),
        (CorruptCheckpoint("the tree is cut"), "is damaged: the tree is cut. Load an earlier one", "/run/1"),
        (UnsupportedFormat("f: newer", path="f"), "cannot be read: f: newer", "/run/1/f"),
        (KeyUnavailable("no key"), "cannot be read: no key", "/run/1"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_file_alone_is_named_by_gets_its_checkpoint(error: AsyncDCPError, said: str, path: str) -> None:
    with pytest.raises(type(error)) as caught, reading("/run/1"), reading("/run/1"):
        raise error
    assert str(caught.value) == f"the checkpoint at /run/1 {said}" and caught.value.path == path


def test_what_names_its_checkpoint_stays_as_it_is() -> None:
    with pytest.raises(AmbiguousCheckpoint, match=r"^two at /run/1$"), reading("/run/1"):
        raise AmbiguousCheckpoint("two at /run/1", path="/run/1")
    with pytest.raises(StorageError, match=r"^cannot read$"), reading("/run/1"):
        raise StorageError("cannot read")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, None])
def test_a_full_storage_is_told_from_a_broken_one(number: int | None) -> None:
    error = storage_error("cannot write f", "f", number)
    assert (error.path, error.errno) == ("f", number)
    full = number in (errno.ENOSPC, errno.EDQUOT)
    assert isinstance(error, StorageFull) == full == ("make room" in str(error))


@pytest.mark.parametrize(("number", "command"), [(errno.EFBIG, "ulimit -f"), (errno.EMFILE, "ulimit -n")])
def test_a_limit_of_the_process_is_named(number: int, command: str) -> None:
    error = storage_error("cannot create f", "f", number)
    assert isinstance(error, StorageError) and error.errno == number
    assert re.search(rf"^cannot create f; raise RLIMIT_\w+ \({command}\)", str(error))
