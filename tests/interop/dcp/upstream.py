"""PyTorch's own tests of its filesystem storage, with the drop-in in the place of what they import.

    python -m tests.interop.dcp.upstream PYTORCH/test/distributed/checkpoint/test_file_system_checkpoint_cpu.py

``PYTORCH`` is a checkout of PyTorch at the version that is installed (its tests are not part of the package; they need
``expecttest``). The file is copied, and one line is added below its import of torch's reader and writer. What follows
goes to pytest, as ``-k thread_count_1``; the exit code is pytest's.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_NAMES = ("FileSystemReader", "FileSystemWriter")


def with_drop_in(source: str) -> str:
    """The test file's text, importing the drop-in's names; ValueError if it does not import torch's."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.module == "torch.distributed.checkpoint":
            names = [alias.name for alias in node.names if alias.name in _NAMES]
            if names:
                lines = source.splitlines(keepends=True)
                lines.insert(node.end_lineno or 0, f"from asyncdcp.interop.dcp import {', '.join(names)}\n")
                return "".join(lines)
    raise ValueError(f"it does not import {' or '.join(_NAMES)} from torch.distributed.checkpoint")


def main(path: str, *options: str) -> int:
    """Runs the tests of the file at ``path``; pytest's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, Path(path).name)
        copy.write_text(with_drop_in(Path(path).read_text()))
        here = Path(__file__).parents[3]
        paths = os.pathsep.join(filter(None, [str(here), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-W", "ignore", *options, str(copy)]
        return subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": paths}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
