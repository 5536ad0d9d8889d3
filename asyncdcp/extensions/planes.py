"""BytePlanes: the first bytes of all numbers of a block, then all second bytes, and so on.

A float's high byte (sign and exponent) takes few values and compresses well, the mantissa hardly; apart, each can be
treated as it deserves. The idea for model weights is ZipNN's (https://arxiv.org/abs/2411.05239); byte shuffling itself
is older (HDF5, Blosc).

With numpy, numbers are cut in halves by casts, which are vectorized and release the GIL; without it, by slices, which
are several times slower. Both make the same bytes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from asyncdcp.extensions.base import BlockContext, BlockExtension

_ELEMENT_SIZES = (1, 2, 4, 8, 16)


class BytePlanes(BlockExtension):
    """Splits a block into the byte planes of its numbers. Stored with a byte more than the block: the number of planes.

    Saves nothing by itself; to be followed by ``ZStandard``.

    >>> bf16 = {"weight": torch.randn(500, 1000).bfloat16()}
    >>> alone, planes = [asyncdcp.ZStandard()], [asyncdcp.BytePlanes(), asyncdcp.ZStandard()]
    >>> with asyncdcp.SyncCheckpointer(process=False, extensions=alone) as checkpointer:
    ...     before = checkpointer.save("alone", bf16).stored_bytes
    >>> with asyncdcp.SyncCheckpointer(process=False, extensions=planes) as checkpointer:
    ...     checkpointer.save("planes", bf16).stored_bytes < before
    True
    """

    role = "compression"

    @staticmethod
    def registry_name() -> str:
        return "block.planes"

    @staticmethod
    def from_descriptor(version: str) -> BytePlanes:
        if version != "1":
            raise ValueError(f"version {version[:20]!r} of {BytePlanes.registry_name()} is not known")
        return BytePlanes()

    def get_descriptor(self) -> str:
        return f"{self.registry_name()}/1"

    def travel(self) -> dict[str, Any]:
        return {}

    def encode(self, data: memoryview, context: BlockContext) -> bytearray:
        """The planes from the lowest byte to the highest, what is left of an odd length, and the number of planes."""
        planes = context.element_size if context.element_size in _ELEMENT_SIZES else 1
        whole = len(data) // planes * planes
        out = bytearray(len(data) + 1)
        view = memoryview(out)
        _split(data[:whole], planes, view[:whole])
        view[whole:-1] = data[whole:]
        view[-1] = planes
        return out

    def decode(self, data: memoryview, context: BlockContext) -> bytearray:
        if len(data) == 0 or data[-1] not in _ELEMENT_SIZES:
            raise ValueError("it does not end with a number of planes")
        if len(data) - 1 > context.limit:
            raise ValueError(f"it has {len(data) - 1} bytes of at most {context.limit}")
        planes, length = data[-1], len(data) - 1
        whole = length // planes * planes
        out = bytearray(length)
        view = memoryview(out)
        _join(data[:whole], planes, view[:whole])
        view[whole:] = data[whole:-1]
        return out


@cache
def _numpy() -> Any:
    """numpy, None where it is not installed."""
    try:
        import numpy
    except ImportError:
        return None
    return numpy


def _split(data: memoryview, planes: int, out: memoryview) -> None:
    if planes == 1:
        out[:] = data
    elif (numpy := _numpy()) is not None:
        _split_numbers(numpy, _numbers(numpy, data, planes), numpy.frombuffer(out, numpy.uint8))
    else:
        taken, length = bytes(data), len(data) // planes
        for plane in range(planes):
            out[plane * length : (plane + 1) * length] = taken[plane::planes]


def _join(data: memoryview, planes: int, out: memoryview) -> None:
    if planes == 1:
        out[:] = data
    elif (numpy := _numpy()) is not None:
        _join_numbers(numpy, numpy.frombuffer(data, numpy.uint8), _numbers(numpy, out, planes))
    else:
        joined, length = bytearray(len(data)), len(data) // planes
        for plane in range(planes):
            joined[plane::planes] = data[plane * length : (plane + 1) * length]
        out[:] = joined


def _numbers(numpy: Any, data: memoryview, size: int) -> Any:
    """The block as unsigned numbers; those of 16 bytes, which numpy lacks, as rows of two."""
    if size == 16:
        return numpy.frombuffer(data, "<u8").reshape(-1, 2)
    return numpy.frombuffer(data, f"<u{size}")


def _split_numbers(numpy: Any, numbers: Any, out: Any) -> None:
    """Writes all lower halves, split in turn, to the first half of ``out``, all upper halves to the second."""
    middle = len(out) // 2
    if numbers.ndim == 2:
        _split_numbers(numpy, numpy.ascontiguousarray(numbers[:, 0]), out[:middle])
        _split_numbers(numpy, numpy.ascontiguousarray(numbers[:, 1]), out[middle:])
    elif numbers.itemsize == 2:
        numpy.copyto(out[:middle], numbers, casting="unsafe")
        numpy.copyto(out[middle:], numbers >> 8, casting="unsafe")
    else:
        half = numbers.itemsize // 2
        _split_numbers(numpy, numbers.astype(f"<u{half}"), out[:middle])
        _split_numbers(numpy, (numbers >> 8 * half).astype(f"<u{half}"), out[middle:])


def _join_numbers(numpy: Any, planes: Any, out: Any) -> None:
    """The inverse of ``_split_numbers``."""
    lower, upper = planes[: len(planes) // 2], planes[len(planes) // 2 :]
    if out.ndim == 2:
        for column, part in ((0, lower), (1, upper)):
            numbers = numpy.empty(len(out), "<u8")
            _join_numbers(numpy, part, numbers)
            out[:, column] = numbers
        return
    half = out.itemsize // 2
    if half > 1:
        halves = numpy.empty((2, len(out)), f"<u{half}")
        _join_numbers(numpy, lower, halves[0])
        _join_numbers(numpy, upper, halves[1])
        lower, upper = halves
    numpy.left_shift(upper, 8 * half, out=out, dtype=out.dtype)
    numpy.bitwise_or(out, lower, out=out)
