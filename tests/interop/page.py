"""The examples on this package's page that need a trainer of somebody else's, which their tests bring."""

from __future__ import annotations

import re
from pathlib import Path

import asyncdcp.interop

_PAGE = Path(asyncdcp.interop.__file__).parent / "README.md"


def example(module: str) -> str:
    """The one that begins with what it imports from ``asyncdcp.interop.<module>``."""
    blocks = re.findall(r"^```py\n(.*?)^```$", _PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (found,) = (block for block in blocks if block.startswith(f"from asyncdcp.interop.{module} import"))
    return str(found)
