"""Torn snapshots: tensors that were changed while they were being copied, found as far as that can be done cheaply.

Two kinds of evidence. Version counters, which torch's in-place operations count up, from the call of ``save`` to the
end of staging; fused optimizers, batch-norm statistics, ``.data`` and numpy do not count. And samples of the memory,
from the moment copying begins to its end: small tensors whole, of large ones some runs of bytes. A change that is
missed by both goes unseen: one that ended before copying began and counted no version, or one that left every sampled
byte as it was. Only tensors in host memory are looked at. Waiting for ``staged``, or a guard, is the guarantee; this is
the alarm.

What it misses, by ``python -m tests.benchmarks.torn`` (100 saves each, torch 2.13): of the tensors that changed while
they were copied; of the saves, none of whose tensors was seen to change, so that they pass; and of the saves, if the
change comes before copying begins, where only counters help (an AdamW's ``step`` has one that counts in all forms).

=====================================  =======  =====  ======
changed meanwhile                      tensors  saves  before
=====================================  =======  =====  ======
AdamW fp32 lr 1e-3, for-loop, foreach  0        0      0
AdamW fp32 lr 1e-3, fused              0        0      0
AdamW bf16 lr 1e-3, fused              0        0      0
AdamW bf16 lr 1e-5, fused              0.8 %    0      0
AdamW fp32 fused, 64 of 20,000 rows    48.5 %   0      0
SGD momentum, for-loop, foreach        0        0      0
SGD momentum, fused                    0        0      100 %
SGD fused, 64 of 20,000 rows           99 %     99 %   100 %
batch-norm statistics                  0        0      0
one row of an embedding by ``.data``   100 %    100 %  100 %
one element of 1,000,000 by numpy      100 %    100 %  100 %
=====================================  =======  =====  ======

It costs 11 ms for 1,000 tensors of 1.5 MB, and 120 to 140 ms for 20,000 of 1 to 20 KB, with cold caches on two cores of
a busy machine, on a thread of its own that lets others have the GIL.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat

from torch import Tensor

SAMPLE_BYTES = 64
WHOLE_BYTES = 1 << 10
"""Tensors up to this size are compared whole, up to the next by two samples, all others by four."""
LARGE_BYTES = 64 << 10


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """The version counters; -1 for inference tensors, which have none."""
    return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


class Witness:
    """Remembers what tensors look like. ``before`` are their versions at the call of ``save``; ``numbers`` says which
    to watch.

    Made when copying begins; keeps the tensors alive. What else is kept is in a few flat arrays: objects by the
    thousand would set off the garbage collector, which costs more than all the looking.
    """

    def __init__(self, tensors: Sequence[Tensor], before: Sequence[int], numbers: Iterable[int]) -> None:
        self._tensors = list(tensors)
        self._before = before
        self._numbers = [number for number in numbers if tensors[number].is_cpu and tensors[number].numel()]
        self._ends = array("Q")  # where each tensor's samples end, counted in samples
        self._addresses = array("Q")
        self._lengths = array("Q")
        for number in self._numbers:
            self._choose(tensors[number])
            self._ends.append(len(self._addresses))
        self._seen = self._look()

    def changed(self) -> list[int]:
        """The numbers of the tensors that are seen to have changed since."""
        now = self._look()
        sampled = iter([False] * len(self._numbers)) if now == self._seen else self._compare(now)
        before, tensors = self._before, self._tensors
        return [
            number
            for number, differs in zip(self._numbers, sampled, strict=True)
            if differs or 0 <= before[number] != tensors[number]._version
        ]

    def _look(self) -> bytes:
        return b"".join(map(ctypes.string_at, self._addresses, self._lengths))

    def _compare(self, now: bytes) -> Iterator[bool]:
        """Whether the samples differ, tensor by tensor."""
        sample = begin = 0
        for end in self._ends:
            stop = begin + sum(self._lengths[sample:end])
            yield now[begin:stop] != self._seen[begin:stop]
            sample, begin = end, stop

    def _choose(self, tensor: Tensor) -> None:
        """Takes the bytes to look at, spread evenly over the tensor's memory."""
        address, nbytes = tensor.data_ptr(), tensor.nbytes
        if not tensor.is_contiguous():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            size = tensor.element_size()
            self._addresses.extend((address, address + last * size))
            self._lengths.extend((size, size))
        elif nbytes <= WHOLE_BYTES:
            self._addresses.append(address)
            self._lengths.append(nbytes)
        else:
            count = 2 if nbytes <= LARGE_BYTES else 4
            step = (nbytes - SAMPLE_BYTES) // (count - 1)
            self._addresses.extend(range(address, address + count * step, step))
            self._lengths.extend(repeat(SAMPLE_BYTES, count))
