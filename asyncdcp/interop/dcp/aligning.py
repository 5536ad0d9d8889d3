"""Elements that were cut, put together: DCP's archives begin anywhere in a file, and reads are cut at its borders."""

from __future__ import annotations

import threading

from asyncdcp.pipeline.windows import Deliver


class WholeElements:
    """A ``deliver`` for pieces of a range that are cut anywhere: passes on whole elements of ``itemsize`` bytes only.

    The range begins and ends with an element. Pieces may come in any order, on several threads; no more is held than
    the elements that were cut.
    """

    def __init__(self, deliver: Deliver, itemsize: int) -> None:
        self._deliver = deliver
        self._itemsize = itemsize
        self._cut: dict[int, tuple[bytearray, list[int]]] = {}
        self._lock = threading.Lock()

    def __call__(self, offset: int, data: memoryview) -> None:
        end, size = offset + len(data), self._itemsize
        first, last = -(-offset // size) * size, end // size * size
        if first < last:
            self._deliver(first, data[first - offset : last - offset])
        if offset < first:
            self._hold(offset, data[: min(first, end) - offset])
        if first <= last < end:
            self._hold(last, data[last - offset :])

    def _hold(self, offset: int, data: memoryview) -> None:
        """Bytes of one element."""
        begin = offset // self._itemsize * self._itemsize
        with self._lock:
            element, lengths = self._cut.setdefault(begin, (bytearray(self._itemsize), []))
            element[offset - begin : offset - begin + len(data)] = data
            lengths.append(len(data))
            whole = sum(lengths) == self._itemsize
            if whole:
                del self._cut[begin]
        if whole:
            self._deliver(begin, memoryview(element))
