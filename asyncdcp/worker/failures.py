"""Errors across the process border: as class name, message and fields, never as pickles.

An error of asyncdcp comes out as the same type with the same fields, the traceback it had there as a note; so do its
causes as long as they are asyncdcp's or the system's (OSError). Anything else is described in the note.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from typing import Any

from asyncdcp import errors
from asyncdcp.errors import AsyncDCPError, in_words, plain
from asyncdcp.worker.protocol import ErrorFrame

_OS_ERROR = "OSError"
_PLAIN = (str, int, float, bool, type(None))


def to_frame(error: BaseException, *, with_traceback: bool = True) -> ErrorFrame:
    """The error as data, causes included; one that is neither asyncdcp's nor the system's as an ``AsyncDCPError``."""
    lines = traceback.format_exception(error) if with_traceback else []
    cause = error.__cause__
    known = isinstance(cause, AsyncDCPError | OSError)
    return ErrorFrame(
        kind=_kind(error),
        message=plain(str(error)) if isinstance(error, AsyncDCPError) else in_words(error),
        fields=_fields(error),
        traceback=plain("".join(lines)),
        cause=to_frame(cause, with_traceback=False) if known and cause is not None else None,
    )


def from_frame(frame: ErrorFrame) -> AsyncDCPError:
    """The error again. A class this side does not know becomes an ``AsyncDCPError`` that says so."""
    error = _made(frame)
    assert isinstance(error, AsyncDCPError)
    if frame.traceback:
        error.add_note(f"\nIn the background process:\n{frame.traceback}")
    return error


def _kind(error: BaseException) -> str:
    name = type(error).__name__
    if isinstance(error, AsyncDCPError):
        return name if getattr(errors, name, None) is type(error) else _nearest(error)
    return _OS_ERROR if isinstance(error, OSError) else AsyncDCPError.__name__


def _nearest(error: AsyncDCPError) -> str:
    """The closest class of asyncdcp's own tree, for one that was derived from it elsewhere."""
    mro = (kind for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind)
    return str(next(mro).__name__)


def _fields(error: BaseException) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if isinstance(error, OSError):
        fields = {"errno": error.errno}
        if not isinstance(error, AsyncDCPError):
            fields |= {"strerror": error.strerror, "filename": error.filename}
    if isinstance(error, AsyncDCPError):
        fields |= {name: value for name, value in vars(error).items() if not name.startswith("__")}
    return {name: _plain_value(value) for name, value in fields.items() if _is_plain(value)}


def _is_plain(value: object) -> bool:
    return isinstance(value, _PLAIN) or (
        isinstance(value, tuple | list) and all(isinstance(item, _PLAIN) for item in value)
    )


def _plain_value(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain_value(item) for item in value]
    return plain(value) if isinstance(value, str) else value


def _made(frame: ErrorFrame) -> BaseException:
    fields = frame.fields
    error: BaseException
    if frame.kind == _OS_ERROR:
        number, text = fields.get("errno"), fields.get("strerror")
        error = OSError(frame.message) if number is None else OSError(number, text, fields.get("filename"))
    else:
        error = _ours(frame)
    error.__cause__ = None if frame.cause is None else _made(frame.cause)
    return error


def _ours(frame: ErrorFrame) -> AsyncDCPError:
    """Made with those fields that its class takes as arguments; the others are set, as its own code had set them."""
    found = getattr(errors, frame.kind, None)
    if not (isinstance(found, type) and issubclass(found, AsyncDCPError)):
        return AsyncDCPError(f"{frame.kind}: {frame.message}")
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in frame.fields.items()}
    make: Callable[..., AsyncDCPError] = found
    taken = inspect.signature(found).parameters
    error = make(frame.message, **{name: value for name, value in fields.items() if name in taken})
    for name, value in fields.items():
        setattr(error, name, value)
    return error
