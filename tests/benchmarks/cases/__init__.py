"""The cases, by the names that the command line knows them by."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tests.benchmarks.cases import (
    cli,
    drop_in,
    first,
    growth,
    lag,
    load,
    memory,
    ranks,
    save,
    sharing,
    small,
    train,
    transport,
    worker,
)
from tests.benchmarks.measuring import Setting
from tests.benchmarks.results import Results

CASES: Mapping[str, Callable[[Setting], Results]] = {
    "save": save.run,
    "load": load.run,
    "train": train.run,
    "lag": lag.run,
    "small": small.run,
    "memory": memory.run,
    "first": first.run,
    "growth": growth.run,
    "worker": worker.run,
    "transport": transport.run,
    "drop-in": drop_in.run,
    "ranks": ranks.run,
    "sharing": sharing.run,
    "cli": cli.run,
}
