"""``python -m asyncdcp.worker``: the background process. Started by asyncdcp itself, with descriptors 3 and 4."""

from __future__ import annotations

from asyncdcp.worker.main import main

if __name__ == "__main__":
    main()
