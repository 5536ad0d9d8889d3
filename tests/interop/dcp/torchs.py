"""What only some of the torch versions have that the package runs with."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

_HAS_EXTENSIONS = find_spec("torch.distributed.checkpoint._extension") is not None

needs_extensions = pytest.mark.skipif(not _HAS_EXTENSIONS, reason="this torch has no extensions (2.7 has)")


def torchs_zstd() -> list[Any]:
    """torch's compression, as its writer takes it."""
    if not _HAS_EXTENSIONS:
        return []
    from torch.distributed.checkpoint._extension import ZStandard

    return [ZStandard()]


def extension_options() -> Any:
    """A pytest parameter: the writer's options with that."""
    return pytest.param({"_extensions": torchs_zstd()}, marks=needs_extensions)
