"""The background process itself: how soon it is ready, and what it holds."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from typing import Final

from tests.benchmarks.measuring import Setting
from tests.benchmarks.results import Budget, Results

_PROGRAM: Final = textwrap.dedent("""
    import asyncio, json, time
    from asyncdcp.config import Options
    from asyncdcp.worker.process import CheckpointProcess
    async def main():
        begun = time.monotonic()
        process = await CheckpointProcess.start(Options())
        seconds = time.monotonic() - begun
        resident = (await process.inspect()).rss_bytes
        await process.aclose(5)
        print(json.dumps([seconds, resident]))
    asyncio.run(main())
""")


def run(setting: Setting) -> Results:
    """From nothing to ready, and resident memory without the arena."""
    results = Results("worker", "the background process: start to ready (ms), resident (MB)", unit="ms, MB")
    for number in range(setting.rounds + 1):
        setting.progress(f"worker: start {number}")
        done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, check=True)
        seconds, resident = json.loads(done.stdout)
        if number:
            results.add("asyncdcp", start=1000 * seconds, resident=resident / 1e6)
    results.budgets = [Budget("asyncdcp", "start", 500.0), Budget("asyncdcp", "resident", 60.0)]
    return results
