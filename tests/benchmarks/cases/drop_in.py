"""``dcp.save`` with torch's writer and with the drop-in: the same files, until they are durable; and loads of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter

from asyncdcp.interop import dcp as drop_in
from tests.benchmarks.limits import Limits
from tests.benchmarks.measuring import Setting, check_equal, clear, place, timed, turns
from tests.benchmarks.results import Ratio, Results
from tests.benchmarks.states import SHAPES, bytes_of, gpt2_adam

_TORCH: Final = "torch's writer"
_OWN: Final = "asyncdcp's drop-in"
_THREADS: Final = ", 2 threads"

WAYS: Mapping[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
    _TORCH: (FileSystemWriter, FileSystemReader),
    _OWN: (drop_in.FileSystemWriter, drop_in.FileSystemReader),
    _TORCH + _THREADS: (lambda path: FileSystemWriter(path, thread_count=2), FileSystemReader),
    _OWN + _THREADS: (lambda path: drop_in.FileSystemWriter(path, thread_count=2), drop_in.FileSystemReader),
}


def run(setting: Setting) -> Results:
    """Each turn saves and loads what it saved, warm where the writer left it in the page cache."""
    source, target = gpt2_adam(SHAPES[setting.size]), gpt2_adam(SHAPES[setting.size])
    results = Results("drop-in", f"dcp.save and dcp.load, {bytes_of(source) / 1e9:.2f} GB, no process group")
    limits = Limits(source)
    results.order([*WAYS, limits.name])
    try:
        for number, name in turns(setting, "drop-in", [*WAYS, limits.name], str):
            with place(setting) as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # without a group DCP says so at every call
                values = _measure(name, folder, source, target) if name in WAYS else _limits(limits, folder)
            if number:
                results.add(name, **values)
    finally:
        limits.close()
    results.ratios.append(Ratio("durable", _OWN, "durable", _TORCH, "durable", 0.5))
    results.ratios.append(Ratio("durable, 2 threads", _OWN + _THREADS, "durable", _TORCH + _THREADS, "durable"))
    for threads in ("", _THREADS):
        results.ratios.append(Ratio(f"load{threads}", _OWN + threads, "load", _TORCH + threads, "load"))
    results.ratios.append(Ratio("durable / raw write + fsync", _OWN, "durable", limits.name, "durable"))
    return results


def _measure(name: str, folder: Path, source: Any, target: Any) -> dict[str, float]:
    writer, reader = WAYS[name]
    durable = timed(lambda: dcp.save(source, storage_writer=writer(folder), no_dist=True))
    clear(target)
    load = timed(lambda: dcp.load(target, storage_reader=reader(folder), no_dist=True))
    check_equal(source, target, name)
    return {"durable": durable, "load": load}


def _limits(limits: Limits, folder: Path) -> dict[str, float]:
    return {"durable": timed(lambda: limits.write(folder))}
