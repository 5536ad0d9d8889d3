"""The dtypes that can be stored."""

from __future__ import annotations

import torch

from asyncdcp.metadata import DTYPE_SIZES


def test_sizes_are_torch_s() -> None:
    """All dtypes that this torch has are there, but for the quantized ones."""
    dtypes = {str(kind).removeprefix("torch."): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)}
    assert {name for name in dtypes if name not in DTYPE_SIZES and not name.startswith("q")} == set()
    assert all(dtypes[name].itemsize == size for name, size in DTYPE_SIZES.items() if name in dtypes)
