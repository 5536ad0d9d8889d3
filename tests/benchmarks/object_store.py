"""Saving to and loading from one S3 server on this machine, beside DCP by way of fsspec/s3fs and of s3torchconnector.

    python -m tests.benchmarks.object_store --size small --rounds 5

Every subject talks to the same server, in turns. There are two, one after the other. moto's takes some ten milliseconds
of its processor for each megabyte and copies the whole object for each range that is read of it: it is the limit, and
clients of many parts and ranges pay for it. Our own (``tests/object_store/lean.py``) does next to nothing, so that
what a client costs is seen. A peer that is not installed is left out: pip install s3fs s3torchconnector tenacity.

Memory is by how much the process grew at the most over what it had when the call began. What is kept from one save to
the next, as asyncdcp's arena of the state's size, is not in it, nor what asyncdcp's background process takes.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed.checkpoint as dcp

from asyncdcp import SyncCheckpointer
from tests.benchmarks.measuring import Setting, check_equal, clear, own_cpu, timed, turns
from tests.benchmarks.results import Ratio, Results
from tests.benchmarks.states import SHAPES, bytes_of, gpt2_adam, tensors_of
from tests.object_store.conftest import BUCKET, KEYS, client, serving

_BUDGETS: Final = {"DCP + s3fs": 1 / 1.5, "DCP + s3torchconnector": 1 / 1.2}


@dataclass
class Subject:
    """``save`` returns when everything is stored, ``load`` when it is in the target's tensors."""

    name: str
    save: Callable[[str], object]
    load: Callable[[str], object]
    close: Callable[[], object] = lambda: None


def own(source: Any, target: Any, *, process: bool) -> Subject:
    """asyncdcp, with the background process or on a thread."""
    checkpointer = SyncCheckpointer(process=process)
    name = "asyncdcp" if process else "asyncdcp, thread"
    return Subject(
        name,
        lambda url: checkpointer.save(url, source),
        lambda url: checkpointer.load(url, target),
        checkpointer.close,
    )


def by_s3fs(source: Any, target: Any, endpoint: str) -> Subject:
    """DCP over fsspec."""
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

    options: Any = {
        "key": KEYS["access_key_id"],
        "secret": KEYS["secret_access_key"],
        "client_kwargs": {"endpoint_url": endpoint, "region_name": KEYS["region"]},
    }
    return Subject(
        "DCP + s3fs",
        lambda url: dcp.save(source, storage_writer=FsspecWriter(url, thread_count=4, **options), no_dist=True),
        lambda url: dcp.load(target, storage_reader=FsspecReader(url, **options), no_dist=True),
    )


def by_s3torchconnector(source: Any, target: Any, endpoint: str) -> Subject:
    """DCP over Amazon's connector."""
    from s3torchconnector import S3ClientConfig
    from s3torchconnector._s3client import S3Client
    from s3torchconnector.dcp import S3StorageReader, S3StorageWriter

    region = KEYS["region"]
    config = S3ClientConfig(force_path_style=True)

    def pointed(storage: Any) -> Any:
        """At the server here: the constructors take no endpoint."""
        client = S3Client(region, endpoint=endpoint, s3client_config=config)
        storage.fs._client = client
        return storage

    def save(url: str) -> None:
        writer = pointed(S3StorageWriter(region, url, s3client_config=config, thread_count=4))
        dcp.save(source, storage_writer=writer, no_dist=True)

    def load(url: str) -> None:
        dcp.load(target, storage_reader=pointed(S3StorageReader(region, url, s3client_config=config)), no_dist=True)

    return Subject("DCP + s3torchconnector", save, load)


def subjects(source: Any, target: Any, endpoint: str) -> list[Subject]:
    """Those that are installed."""
    found = [own(source, target, process=True), own(source, target, process=False)]
    if find_spec("s3fs"):
        found.append(by_s3fs(source, target, endpoint))
    if find_spec("s3torchconnector") and find_spec("tenacity"):
        found.append(by_s3torchconnector(source, target, endpoint))
    return found


def run(setting: Setting, endpoint: str) -> Results:
    """A save and a load of each subject, in turns."""
    source, target = gpt2_adam(SHAPES[setting.size]), gpt2_adam(SHAPES[setting.size])
    about = f"one S3 server on this machine; {bytes_of(source) / 1e9:.2f} GB in {len(tensors_of(source))} tensors"
    measured = subjects(source, target, endpoint)
    ratios = [
        Ratio(f"{metric}, {mine.name} / {peer.name}", mine.name, metric, peer.name, metric, _BUDGETS.get(peer.name))
        for peer in measured[2:]
        for metric in ("save", "load")
        for mine in measured[:2]
    ]
    results = Results("object_store", about, ratios=ratios)
    results.order(subject.name for subject in measured)
    try:
        for number, subject in turns(setting, "object_store", measured, lambda subject: subject.name):
            values = _measure(subject, f"s3://{BUCKET}/turn-{time.monotonic_ns()}", source, target)
            _empty(endpoint)
            if number:
                results.add(subject.name, **values)
    finally:
        for subject in measured:
            subject.close()
    return results


def _measure(subject: Subject, url: str, source: Any, target: Any) -> dict[str, float]:
    saved = _costs("save", lambda: subject.save(url))
    clear(target)
    loaded = _costs("load", lambda: subject.load(url))
    check_equal(source, target, subject.name)
    return saved | loaded


def _costs(name: str, call: Callable[[], object]) -> dict[str, float]:
    """Seconds, the processor's of this process, and MiB that it grew by at the most."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, cpu = _memory("VmRSS"), own_cpu()
    seconds = timed(call)
    return {name: seconds, f"{name}_CPU": own_cpu() - cpu, f"{name}_MiB": _memory("VmHWM") - before}


def _memory(field: str) -> float:
    """Of this process, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) / 1024


def _empty(endpoint: str) -> None:
    """What is in the bucket is in the server's memory."""
    store = client(endpoint)
    for page in store.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
        for found in page.get("Contents", []):
            store.delete_object(Bucket=BUCKET, Key=found["Key"])


def main() -> None:
    """Starts each server, measures, and prints its table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.object_store", description=__doc__)
    parser.add_argument("--size", choices=sorted(SHAPES), default="gpt2", help="(default: %(default)s)")
    parser.add_argument("--server", choices=["moto", "lean"], action="append", help="(default: both)")
    parser.add_argument("--rounds", type=int, default=5, help="that count, after one to warm up (default: %(default)s)")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    os.environ.update({f"AWS_{name.upper()}": value for name, value in KEYS.items()})
    for server in args.server or ["moto", "lean"]:
        with serving(server) as url:
            os.environ["AWS_ENDPOINT_URL"] = url
            setting = Setting(Path(), args.size, args.rounds, 1, ())
            print(f"server: {server}\n{run(setting, url).table()}")
    print(f"torch {torch.__version__}")


if __name__ == "__main__":
    main()
