"""Every error asyncdcp raises: one tree, whose branches say who is at fault.

``AsyncDCPError`` is the root. Below it stand the caller's mistakes (``UsageError``), what became of a save that nobody
got wrong (``SaveInterrupted``), a peer's failure (``PeerError``), the storage's (``StorageError``) and damage in a
checkpoint's own bytes (``CorruptCheckpoint``). Leaves have a builtin as second base where one is natural, so
``except FileNotFoundError`` works as anyone would expect. Fields hold plain values only: an error can travel between
processes as its class name, message and fields.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any, Final


class AsyncDCPError(Exception):
    """The root of all errors of asyncdcp.

    ``path`` is the checkpoint or file, ``rank`` the rank at fault, ``tensors`` the FQNs concerned; each where known.
    """

    def __init__(
        self, message: str, *, path: str | None = None, rank: int | None = None, tensors: Sequence[str] = ()
    ) -> None:
        super().__init__(message)
        self.path = path
        self.rank = rank
        self.tensors = tuple(tensors)

    def __str__(self) -> str:
        # OSError and KeyError, second bases of some leaves, would print the message in their own way.
        return str(self.args[0]) if self.args else ""

    def __reduce__(self) -> tuple[Any, ...]:
        # With all fields. Torch gathers the errors of all ranks as pickles, and one that cannot be made again would
        # stand in the place of what it says.
        options = (option for option in signature(type(self)).parameters.values() if option.kind is option.KEYWORD_ONLY)
        fields = {option.name: getattr(self, option.name) for option in options}
        return partial(type(self), **fields), self.args, vars(self)


def plain(text: str) -> str:
    """Text that can be encoded: a path's bytes that are not UTF-8 (surrogates) are written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def in_words(error: BaseException) -> str:
    """An error as other processes are told of it where its fields do not count."""
    return plain(f"{type(error).__name__}: {error}")


# ── the caller ──────────────────────────────────────────────────────────────────────────────────────────────────────


class UsageError(AsyncDCPError):
    """The call cannot be carried out as it was made. Nothing was written."""


class InvalidOption(UsageError, ValueError):
    """An option has a value that means nothing; the message names the option and what it takes."""


class MissingDependency(UsageError, ImportError):
    """The call needs a package that is not installed; the message names the extra that brings it."""


class UnsupportedValue(UsageError, TypeError):
    """The state holds something that cannot be stored; the message names it, its type and the way out."""


class DuplicateName(UsageError, ValueError):
    """Two entries of a state have the same fully qualified name (FQN)."""


class StateMismatch(UsageError, ValueError):
    """The targets of a load and the checkpoint do not match: found before a byte was read, but for what a
    Stateful's own ``load_state_dict`` does not take.

    ``missing`` are FQNs that the state wants and the checkpoint lacks, ``unexpected`` the other way round,
    ``mismatched`` those whose shape, dtype or kind differ.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        mismatched: Sequence[str] = (),
    ) -> None:
        super().__init__(message, path=path, tensors=(*missing, *unexpected, *mismatched))
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.mismatched = tuple(mismatched)


class ReplicaMismatch(UsageError, ValueError):
    """Ranks hold different things under one name, of which only one would be kept; ``tensors`` are the names."""


class CheckpointNotFound(UsageError, FileNotFoundError):
    """There is no committed checkpoint at the path."""


class CheckpointGone(CheckpointNotFound):
    """There was a checkpoint, and it was deleted while it was being read, as retention does; a newer one is there."""


class CheckpointExists(UsageError, FileExistsError):
    """There is a committed checkpoint at the path, and ``overwrite=True`` was not given."""


class Closed(UsageError, RuntimeError):
    """The checkpointer was closed before the call."""


class WouldDeadlock(UsageError, RuntimeError):
    """A blocking wait in a place that the awaited result itself needs, such as a done callback."""


class CheckpointerBusy(UsageError, RuntimeError):
    """An earlier save is still under way and ``when_busy="error"``."""


class KeyUnavailable(UsageError):
    """A checkpoint is encrypted, and the key that it was encrypted with was not given; the message names the key's id,
    never a key.
    """


class MemoryLimit(UsageError, MemoryError):
    """Staging needs more memory than the machine or its cgroup has left; the message names ``staging_bytes``."""


# ── a save or load that came to an end without a result ─────────────────────────────────────────────────────────────


class SaveInterrupted(AsyncDCPError):
    """A save was given up before it was committed. Nothing of it will ever be published."""


class SaveSkipped(SaveInterrupted):
    """The save was not begun: an earlier one was still under way and ``when_busy="skip"``."""


class SaveAborted(SaveInterrupted):
    """The save lost its Record to an abort, whose rank and cause the message names."""


class StructureChanged(SaveAborted):
    """What the ranks wrote does not cover what they hold: on one of them the state's structure has changed since they
    divided it among themselves. They agree anew, and the next save is complete if what they hold fits together by then.
    """


class Cancelled(AsyncDCPError):
    """The save or load was given up by ``cancel()``, or by its checkpointer's end."""


class TornSnapshotError(SaveInterrupted):
    """Tensors (``tensors``) were changed while they were being copied, so the copy is of no moment in time.

    Wait for ``staged`` before changing them, or ``guard`` the optimizer that does.
    """


class DeadlineExceeded(AsyncDCPError, TimeoutError):
    """A wait came to its deadline; the message names what was waited for and the option that sets it."""


class UnseenFailure(AsyncDCPError):
    """An earlier save failed and nobody looked at its future; raised at the next verb or at close.

    The save's own error is the ``__cause__``.
    """


# ── a peer ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class PeerError(AsyncDCPError):
    """Another rank or the background process failed."""


class PeerFailed(PeerError):
    """Another rank gave the save up; ``rank`` is it, and the message names its cause."""


class Fenced(PeerError):
    """Another writer has taken the run over with a newer ``term``; what this one still commits is off the line."""

    def __init__(self, message: str, *, path: str | None = None, term: int | None = None) -> None:
        super().__init__(message, path=path)
        self.term = term


class WorkerCrashed(PeerError):
    """The background process ended, or could not be started, before the save was committed; it will not be any more.

    ``signal`` is the number of the signal that ended it, None where it exited by itself; ``save`` the save's id.
    """

    def __init__(
        self, message: str, *, path: str | None = None, signal: int | None = None, save: str | None = None
    ) -> None:
        super().__init__(message, path=path)
        self.signal = signal
        self.save = save


# ── the storage ─────────────────────────────────────────────────────────────────────────────────────────────────────


class StorageError(AsyncDCPError, OSError):
    """The storage refused or failed an operation; ``errno`` is the operating system's number where it has one."""

    def __init__(self, message: str, *, path: str | None = None, errno: int | None = None) -> None:
        super().__init__(message, path=path)
        self.errno = errno


class StorageFull(StorageError):
    """No space or quota is left (ENOSPC, EDQUOT)."""


class StorageUnavailable(StorageError):
    """A storage did not answer, or did not let us in, or this process has come to a limit of its own, such as that on
    open files; the message names the way out. It says nothing of what lies there: a checkpoint that was to be read may
    be whole, so none is taken for damaged, and no older one is taken in its place. Try again once that is mended.
    """


_UNAVAILABLE: Final = frozenset(
    {errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET}
    | {errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH}
    | {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
)
_KINDS: Final = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), StorageFull),
    **dict.fromkeys((*_UNAVAILABLE, errno.EACCES, errno.EPERM), StorageUnavailable),
}
_ROOM: Final = "make room (asyncdcp gc removes what cut-off saves have left)"
_WAYS_OUT: Final = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "raise RLIMIT_FSIZE (ulimit -f), or save where the filesystem takes larger files",
    errno.EMFILE: "raise RLIMIT_NOFILE (ulimit -n)",
    errno.ENOMEM: "free memory, or raise RLIMIT_AS (ulimit -v) where that is set",
}


def with_way_out(message: str, number: int | None) -> str:
    """The message, and the way out where the system's number names one."""
    return f"{message}; {_WAYS_OUT[number]}" if number in _WAYS_OUT else message


def foreign_error(what: str, error: BaseException, *, path: str | None = None) -> AsyncDCPError:
    """What to raise where ``what`` failed by an error that is not asyncdcp's, which becomes the cause."""
    number = error.errno if isinstance(error, OSError) else None
    known = AsyncDCPError(with_way_out(f"{what} failed: {type(error).__name__}: {error}", number), path=path)
    known.__cause__ = error
    return known


def is_unavailable(number: int | None) -> bool:
    """Whether the system's number is that of a storage that does not answer, or of a limit of this process."""
    return number in _UNAVAILABLE


def storage_error(message: str, path: str, number: int | None) -> StorageError:
    """The error of a storage by the system's number, where it has one, of the class that this calls for; with the way
    out.
    """
    kind = StorageError if number is None else _KINDS.get(number, StorageError)
    return kind(with_way_out(message, number), path=path, errno=number)


class CommitUnknown(StorageError):
    """Whether the save was committed cannot be told, since its Record could be neither won nor read.

    Look again with a load once the storage answers: the checkpoint is there whole, or not at all.
    """


class ThreadPipelineWarning(UserWarning):
    """Something of a save cannot travel to the background process, so the save runs on a thread of this one."""


class ExtensionOrderWarning(UserWarning):
    """Extensions are in an order that saves nothing: what is encrypted does not compress."""


class VolatileStorageWarning(UserWarning):
    """The filesystem keeps its data in memory only: what is durable on it does not survive a restart."""


# ── the checkpoint's bytes ──────────────────────────────────────────────────────────────────────────────────────────


class CorruptCheckpoint(AsyncDCPError):
    """The bytes of a checkpoint are not what a save wrote. ``path`` names the file, with the checkpoint's location."""


class ChecksumMismatch(CorruptCheckpoint):
    """A block's checksum differs: ``path`` names the file, ``block`` its number, ``tensors`` what lies in it."""

    def __init__(self, message: str, *, path: str, block: int, tensors: Sequence[str] = ()) -> None:
        super().__init__(message, path=path, tensors=tensors)
        self.block = block


class UnsupportedFormat(CorruptCheckpoint):
    """The checkpoint was written by a newer asyncdcp, needs an extension that is not there, or is not asyncdcp's."""


class AmbiguousCheckpoint(CorruptCheckpoint):
    """Two saves blind to each other committed to one path; both are whole, and someone must choose."""


@contextmanager
def reading(location: str, way_out: str = "Load an earlier one") -> Iterator[None]:
    """Around what reads the checkpoint at ``location``: what is said in here of one of its files, by the file's name
    alone, comes out with the checkpoint that it is of, and with the way out of damage.
    """
    try:
        yield
    except (CorruptCheckpoint, KeyUnavailable) as error:
        if not (error.path or "").startswith(location):
            unread = isinstance(error, UnsupportedFormat | KeyUnavailable)
            how, end = ("cannot be read", "") if unread else ("is damaged", f". {way_out}")
            error.args = (f"the checkpoint at {location} {how}: {error}{end}",)
            error.path = os.path.join(location, error.path or "").rstrip("/")
        raise
