"""Codecs of plain values that hold no other values: texts, bytes, torch's small types, paths, times.

Each codec knows one exact type and one tag. ``encode`` gives JSON-able content, ``decode`` takes content that nobody
has checked: it returns a value of exactly that type or raises ValueError, TypeError, LookupError, ArithmeticError or
RuntimeError, which the caller turns into ``CorruptCheckpoint``. What is well-formed but not to be had here (a dtype
of a newer torch, a time zone) raises ``UnsupportedFormat``. Names are only ever looked up in fixed tables.
"""

from __future__ import annotations

import binascii
import datetime
import decimal
import io
import math
import pathlib
import re
import uuid
import zoneinfo
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from asyncdcp.errors import UnsupportedFormat

INT64 = 1 << 63  # JSON integers are kept below this magnitude; larger ones are tagged.


class Refusal(Exception):
    """A value of a known type whose content cannot be stored; its text is the reason."""


class Leaf(NamedTuple):
    """The codec of one exact type."""

    tag: str
    kind: type
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


# ── checks of untrusted content ─────────────────────────────────────────────────────────────────────────────────────


def exactly(kind: type, obj: Any) -> Any:
    """``obj``, which must be exactly of ``kind``; raises TypeError otherwise."""
    if type(obj) is not kind:
        raise TypeError(f"{kind.__name__} expected, {type(obj).__name__} found")
    return obj


def fields(obj: Any, count: int) -> list[Any]:
    """``obj``, which must be a list of ``count`` items; raises TypeError or ValueError otherwise."""
    items: list[Any] = exactly(list, obj)
    if len(items) != count:
        raise ValueError(f"{count} fields expected, {len(items)} found")
    return items


def to_base64(data: bytes | bytearray | memoryview) -> str:
    """Base64 without line breaks."""
    return binascii.b2a_base64(data, newline=False).decode("ascii")


def from_base64(obj: Any) -> bytes:
    """The bytes of a base64 string; nothing but canonical base64 is taken."""
    return binascii.a2b_base64(exactly(str, obj), strict_mode=True)


def encode_text(text: str) -> Any:
    """A str as JSON holds it; one with lone surrogates, which JSON cannot hold, as tagged base64."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return {"str": to_base64(text.encode("utf-8", "surrogatepass"))}
    return text


def decode_text(obj: Any) -> str:
    """The str that ``encode_text`` was given."""
    if type(obj) is dict and list(obj) == ["str"]:
        return _decode_str(obj["str"])
    text: str = exactly(str, obj)
    return text


def _decode_str(obj: Any) -> str:
    return from_base64(obj).decode("utf-8", "surrogatepass")


def encode_int(value: int) -> Any:
    """An int as JSON holds it; one beyond 64 bits as tagged hexadecimal, which is read in linear time."""
    return value if -INT64 <= value < INT64 else {"int": format(value, "x")}


def decode_int(obj: Any) -> int:
    """The int that ``encode_int`` was given."""
    if type(obj) is dict and list(obj) == ["int"]:
        return _decode_hex(obj["int"])
    value: int = exactly(int, obj)
    return value


_HEX = re.compile(r"-?[0-9a-f]+", re.ASCII)


def _decode_hex(obj: Any) -> int:
    if _HEX.fullmatch(exactly(str, obj)) is None:
        raise ValueError("hexadecimal digits expected")
    return int(obj, 16)


def encode_float(value: float) -> Any:
    """A float as JSON holds it; nan (with its sign) and the infinities tagged."""
    if math.isfinite(value):
        return value
    sign = "-" if math.copysign(1.0, value) < 0 else ""
    return {"float": sign + str(abs(value))}


_SPECIAL_FLOATS = frozenset({"nan", "-nan", "inf", "-inf"})


def decode_float(obj: Any) -> float:
    """The float that ``encode_float`` was given."""
    if type(obj) is dict and list(obj) == ["float"]:
        text = exactly(str, obj["float"])
        if text not in _SPECIAL_FLOATS:
            raise ValueError("nan or an infinity expected")
        return float(text)  # a new object: of one nan, a set holds one, of several, several
    value: float = exactly(float, obj)
    return value


# ── torch ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _torch_names(kind: type) -> dict[str, Any]:
    return {str(value).removeprefix("torch."): value for value in vars(torch).values() if type(value) is kind}


def _torch_leaf(tag: str, kind: type) -> Leaf:
    """The codec of an enumeration of torch, by the names that this torch has."""
    names = _torch_names(kind)

    def decode(obj: Any) -> Any:
        if exactly(str, obj) not in names:
            raise UnsupportedFormat(f"torch {torch.__version__} has no {tag} {obj[:40]!r}")
        return names[obj]

    return Leaf(tag, kind, lambda value: str(value).removeprefix("torch."), decode)


def _decode_size(obj: Any) -> torch.Size:
    return torch.Size(list(map(decode_int, exactly(list, obj))))


_DEVICE = re.compile(r"[a-z][a-z0-9_]{0,31}(:\d{1,3})?", re.ASCII)


def _decode_device(obj: Any) -> torch.device:
    if _DEVICE.fullmatch(exactly(str, obj)) is None:
        raise ValueError("not a device")
    try:
        return torch.device(obj)
    except RuntimeError as error:
        raise UnsupportedFormat(f"torch {torch.__version__} has no device {obj!r}") from error


# ── times and paths ─────────────────────────────────────────────────────────────────────────────────────────────────


def _encode_delta(delta: datetime.timedelta) -> list[int]:
    return [delta.days, delta.seconds, delta.microseconds]


def _decode_delta(obj: Any) -> datetime.timedelta:
    return datetime.timedelta(*[exactly(int, part) for part in fields(obj, 3)])


_ZONE = re.compile(r"[A-Za-z0-9_+\-]{1,64}(/[A-Za-z0-9_+\-]{1,64}){0,3}", re.ASCII)


def _encode_zone(zone: datetime.tzinfo | None) -> Any:
    """None, the key of a ZoneInfo, or offset and name of a fixed timezone."""
    if zone is None:
        return None
    if type(zone) is zoneinfo.ZoneInfo and zone.key is not None and _ZONE.fullmatch(zone.key):
        return zone.key
    if type(zone) is datetime.timezone:
        offset, *name = zone.__getinitargs__()  # type: ignore[attr-defined]  # pickle's own view; not in typeshed
        return [_encode_delta(offset), *map(encode_text, name)]
    raise Refusal(f"its tzinfo is a {type(zone).__module__}.{type(zone).__qualname__}")


def _decode_zone(obj: Any) -> datetime.tzinfo | None:
    if obj is None:
        return None
    if type(obj) is not str:
        offset, *name = exactly(list, obj)
        return datetime.timezone(_decode_delta(offset), *map(decode_text, name))
    if _ZONE.fullmatch(obj) is None:
        raise ValueError("not a time zone's key")
    try:
        return zoneinfo.ZoneInfo(obj)
    except (zoneinfo.ZoneInfoNotFoundError, OSError) as error:
        raise UnsupportedFormat(f"the time zone {obj!r} is not known") from error


def _encode_zone_of(value: datetime.datetime | datetime.time) -> list[Any]:
    return [value.replace(tzinfo=None).isoformat(), value.fold, _encode_zone(value.tzinfo)]


def _decode_zoned(kind: type[datetime.datetime] | type[datetime.time], obj: Any) -> Any:
    text, fold, zone = fields(obj, 3)
    value = kind.fromisoformat(exactly(str, text))
    if value.tzinfo is not None or type(fold) is not int:
        raise ValueError("a naive time and a fold expected")
    return value.replace(fold=fold, tzinfo=_decode_zone(zone))


def _path_leaf(tag: str, kind: type[pathlib.PurePath]) -> Leaf:
    def decode(obj: Any) -> pathlib.PurePath:
        text = decode_text(obj)
        try:
            return kind(text)
        except NotImplementedError as error:  # its subclass pathlib.UnsupportedOperation since Python 3.13
            raise UnsupportedFormat(f"{kind.__name__} is not to be had") from error

    return Leaf(tag, kind, lambda value: encode_text(str(value)), decode)


def _decode_decimal(obj: Any) -> decimal.Decimal:
    return decimal.Decimal(exactly(str, obj))


LEAVES: tuple[Leaf, ...] = (
    Leaf("int", int, lambda value: format(value, "x"), _decode_hex),
    Leaf("float", float, lambda value: encode_float(value)["float"], lambda obj: decode_float({"float": obj})),
    Leaf("str", str, lambda value: to_base64(value.encode("utf-8", "surrogatepass")), _decode_str),
    Leaf(
        "complex",
        complex,
        lambda value: [encode_float(value.real), encode_float(value.imag)],
        lambda obj: complex(*map(decode_float, fields(obj, 2))),
    ),
    Leaf("bytes", bytes, to_base64, from_base64),
    Leaf("bytearray", bytearray, to_base64, lambda obj: bytearray(from_base64(obj))),
    Leaf("bytesio", io.BytesIO, lambda value: to_base64(value.getbuffer()), lambda obj: io.BytesIO(from_base64(obj))),
    Leaf("size", torch.Size, lambda value: list(map(encode_int, value)), _decode_size),
    _torch_leaf("dtype", torch.dtype),
    _torch_leaf("layout", torch.layout),
    _torch_leaf("memory_format", torch.memory_format),
    Leaf("device", torch.device, str, _decode_device),
    _path_leaf("posix_path", pathlib.PosixPath),
    _path_leaf("windows_path", pathlib.WindowsPath),
    _path_leaf("pure_posix_path", pathlib.PurePosixPath),
    _path_leaf("pure_windows_path", pathlib.PureWindowsPath),
    Leaf("datetime", datetime.datetime, _encode_zone_of, lambda obj: _decode_zoned(datetime.datetime, obj)),
    Leaf("time", datetime.time, _encode_zone_of, lambda obj: _decode_zoned(datetime.time, obj)),
    Leaf("date", datetime.date, datetime.date.isoformat, lambda obj: datetime.date.fromisoformat(exactly(str, obj))),
    Leaf("timedelta", datetime.timedelta, _encode_delta, _decode_delta),
    Leaf(
        "range",
        range,
        lambda value: [encode_int(value.start), encode_int(value.stop), encode_int(value.step)],
        lambda obj: range(*map(decode_int, fields(obj, 3))),
    ),
    Leaf("uuid", uuid.UUID, lambda value: value.hex, lambda obj: uuid.UUID(hex=exactly(str, obj))),
    Leaf("decimal", decimal.Decimal, str, _decode_decimal),
)
