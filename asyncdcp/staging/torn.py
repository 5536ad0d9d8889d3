"""Torn snapshots: tensors that were changed while they were being copied, found as far as that can be done cheaply.

Two kinds of evidence. Version counters, which torch's in-place operations count up, from the call of ``save`` to the
end of staging; fused optimizers, batch-norm statistics, ``.data`` and numpy do not count. And samples of the memory,
from the moment copying begins to its end: small tensors whole, of large ones some runs of bytes. A change that is
missed by both goes unseen: one that ended before copying began and counted no version, or one that left every sampled
byte as it was. Only tensors in host memory are looked at. Waiting for ``staged``, or a guard, is the guarantee; this is
the alarm.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence

from torch import Tensor

SAMPLES = 8
SAMPLE_BYTES = 64
WHOLE_BYTES = 4096
"""Tensors up to this size are compared whole."""


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """The version counters; -1 for inference tensors, which have none."""
    return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


class Witness:
    """Remembers what tensors look like. ``before`` are their versions at the call of ``save``; ``numbers`` says which
    to watch.

    Made when copying begins; the tensors must stay alive until ``changed`` is called.
    """

    def __init__(self, tensors: Sequence[Tensor], before: Sequence[int], numbers: Iterable[int]) -> None:
        self._watched = [
            (number, tensors[number], before[number], _runs(tensors[number]))
            for number in numbers
            if tensors[number].device.type == "cpu" and tensors[number].numel()
        ]
        self._samples = [[ctypes.string_at(*run) for run in runs] for _, _, _, runs in self._watched]

    def changed(self) -> list[int]:
        """The numbers of the tensors that are seen to have changed since."""
        found = []
        for (number, tensor, version, runs), samples in zip(self._watched, self._samples, strict=True):
            counted = version >= 0 and tensor._version != version
            if counted or any(ctypes.string_at(*run) != sample for run, sample in zip(runs, samples, strict=True)):
                found.append(number)
        return found


def _runs(tensor: Tensor) -> list[tuple[int, int]]:
    """Addresses and lengths of the bytes to look at, spread evenly over the tensor's memory."""
    address, nbytes = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    if not tensor.is_contiguous():
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        size = tensor.element_size()
        return [(address, size), (address + last * size, size)]
    if nbytes <= WHOLE_BYTES:
        return [(address, nbytes)]
    step = (nbytes - SAMPLE_BYTES) // (SAMPLES - 1)
    return [(address + n * step, SAMPLE_BYTES) for n in range(SAMPLES)]
