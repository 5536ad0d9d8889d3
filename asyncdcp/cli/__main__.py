"""``python -m asyncdcp.cli``: the same as the program ``asyncdcp``."""

from __future__ import annotations

import sys

from asyncdcp.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
