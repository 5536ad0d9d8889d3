"""Warnings about a line of the user's, however deep below it they arise."""

from __future__ import annotations

import sys
import warnings
from typing import Final

_PACKAGE: Final = __name__.partition(".")[0]


def warn_caller(message: str, category: type[Warning]) -> None:
    """Warns of the line that called into this package, on the thread that did. (``skip_file_prefixes`` of
    ``warnings.warn`` does so from Python 3.12 on.)
    """
    frame, level = sys._getframe(), 1
    while frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE and frame.f_back is not None:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
