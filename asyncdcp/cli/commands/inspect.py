"""``asyncdcp inspect``: what a checkpoint holds, from its Record and indexes alone; with ``--tensor`` from its data."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import click

from asyncdcp.cli.entries import Entry, chosen, entries_of, plain_text
from asyncdcp.cli.opening import complete_entry, damage_of, opened, record_of
from asyncdcp.cli.output import DIFFERENT, say, say_json
from asyncdcp.cli.targets import AS_JSON, PLACE, run
from asyncdcp.cli.text import Column, bad, count_text, dim, iso_text, number_text, shown, size_text, table, time_text
from asyncdcp.cli.tree import Leaf, Row, deep, folded, grow, overview, rows
from asyncdcp.metadata import Record
from asyncdcp.pipeline.formats import ReadableCheckpoint

_LINES = 60
_TREE = (
    Column("name", cut=True),
    Column("dtype or value", cut=True),
    Column("shape"),
    Column("size", right=True),
    Column("chunks", right=True),
    Column("files"),
)
_STATISTICS = (
    Column("name", cut=True),
    Column("dtype"),
    Column("shape"),
    Column("min", right=True),
    Column("max", right=True),
    Column("mean", right=True),
    Column("std", right=True),
    Column("beware"),
    Column("first values", cut=True),
)


@click.command()
@click.argument("checkpoint", metavar="CKPT", type=PLACE)
@click.option(
    "-t",
    "--tensor",
    "globs",
    metavar="GLOB",
    multiple=True,
    shell_complete=complete_entry,
    help="Read these tensors: statistics and a few values. May be repeated.",
)
@click.option("--depth", type=click.IntRange(min=1), help=f"Levels of the tree; by default what fits {_LINES} lines.")
@click.option("-a", "--all", "everything", is_flag=True, help="The whole tree, a line for each tensor.")
@AS_JSON
def command(checkpoint: str, globs: tuple[str, ...], depth: int | None, *, everything: bool, as_json: bool) -> int:
    """Show what a checkpoint holds: names, dtypes, shapes, sizes, chunks, files and plain values.

    Layers that are alike stand as one line. --tensor 'model.*.weight' reads tensors, and verifies them. The exit status
    is 1 if a data file is missing or too short.
    """
    if globs:
        run(_show_statistics, checkpoint, globs, as_json=as_json)
        return 0
    return run(_show_tree, checkpoint, depth, everything=everything, as_json=as_json)


# ── the tree ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _show_tree(checkpoint: str, depth: int | None, *, everything: bool, as_json: bool) -> int:
    seen = None
    while True:
        async with opened(checkpoint, data=False) as reader:
            damage, save_id = await damage_of(checkpoint, reader), reader.metadata.storage_meta.save_id
            if damage is not None and save_id != seen:
                seen = save_id  # it may have been replaced meanwhile, which is no damage
                continue
            entries = entries_of(reader)
            if as_json:
                say_json({**_as_json(reader, entries), "damage": damage})
            else:
                say(_header(checkpoint, reader, entries))
                if damage is not None:
                    say(f"  {bad('damaged')}   {shown(damage)}; asyncdcp verify shows all")
                say("")
                say(_tree(entries, depth, everything=everything))
            return 0 if damage is None else DIFFERENT


def _header(checkpoint: str, reader: ReadableCheckpoint, entries: list[Entry]) -> Iterator[str]:
    meta, record = reader.metadata.storage_meta, record_of(reader)
    tensors = [entry for entry in entries if entry.is_tensor]
    values = count_text(len(entries) - len(tensors), "plain value")
    tied = sum(entry.alias_of is not None for entry in tensors)
    size = sum(entry.size for entry in tensors if entry.alias_of is None)
    also = f"{count_text(tied, 'tied name')}, " if tied else ""
    files = count_text(len({file for entry in entries for file in entry.files}), "file")
    yield shown(checkpoint)
    if record is not None:
        versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
        yield f"  saved     {time_text(record.time)} by {count_text(record.world_size, 'rank')}, with {shown(versions)}"
    yield f"  holds     {count_text(len(tensors) - tied, 'tensor')} of {size_text(size)}, {also}{values}"
    if record is not None:
        yield f"  stored    {_stored(record)} in {files}"
        yield f"  save id   {record.save_id}"
    else:
        yield "  stored    in another format than asyncdcp's own"
    if record is not None and record.metrics:
        known = {name: value for name, value in record.metrics.items() if value is not None}
        yield "  metrics   " + ", ".join(f"{shown(name)} {number_text(value)}" for name, value in known.items())
    for name, value in meta.user.items():
        yield f"  metadata  {shown(name)} = {shown(repr(value))[:200]}"


def _stored(record: Record) -> str:
    if record.summary is None:
        return "data"
    by = f" by {' then '.join(record.summary.transforms)}" if record.summary.transforms else ""
    return f"{size_text(record.summary.stored_bytes)}{shown(by)}"


def _tree(entries: list[Entry], depth: int | None, *, everything: bool) -> Iterator[str]:
    nodes = grow((entry.name, _leaf(entry)) for entry in entries)
    if everything:
        opened = deep(nodes, depth or sys.maxsize)
    else:
        nodes = folded(nodes)
        opened = overview(nodes, _LINES) if depth is None else deep(nodes, depth)
    lines = [*rows(nodes, opened)]
    many = any(entry.chunks > 1 or len(entry.files) > 1 for entry in entries)
    cells = [_cells(line) if many else (*_cells(line)[:4], "", "") for line in lines]
    yield from table(_TREE, cells)
    if any(line.closed for line in lines):
        yield dim("… more inside: --depth N, or --all")


def _leaf(entry: Entry) -> Leaf:
    if entry.alias_of is not None:
        return Leaf(f"→ {shown(entry.alias_of)}", "tied", 0, 0, "", is_tensor=True)
    if not entry.is_tensor:
        return Leaf(plain_text(entry.value, 40), "", 0, 0, "", is_tensor=False)
    files = ", ".join(file.split("-", 1)[-1].split(".")[0] for file in entry.files[:3])
    more = " …" if len(entry.files) > 3 else ""
    return Leaf(entry.dtype, str(list(entry.shape)), entry.size, entry.chunks, files + more, is_tensor=True)


def _cells(row: Row) -> tuple[str, ...]:
    node = row.node
    label = dim(row.branch) + shown(node.label)
    if node.times > 1:
        label += dim(f"  {node.times} alike")
    if node.leaf is not None:
        leaf = node.leaf
        size = size_text(leaf.size) if leaf.chunks else ""
        return (label, leaf.kind, leaf.shape, size, str(leaf.chunks) if leaf.chunks else "", leaf.files)
    holds = [count_text(node.tensors, "tensor")] if node.tensors else []
    holds += [count_text(node.values, "value")] if node.values else []
    more = " …" if row.closed else ""
    return (label, dim(", ".join(holds) + more), "", size_text(node.size) if node.tensors else "", "", "")


def _as_json(reader: ReadableCheckpoint, entries: list[Entry]) -> dict[str, Any]:
    meta, record = reader.metadata.storage_meta, record_of(reader)
    summary = record.summary if record else None
    return {
        "path": meta.checkpoint_id,
        "save_id": meta.save_id,
        "time": iso_text(meta.time),
        "world_size": meta.world_size,
        "metadata": meta.user,
        "versions": record.versions if record else None,
        "term": record.term if record else None,
        "parent": record.parent if record else None,
        "tensor_bytes": summary.tensor_bytes if summary else None,
        "stored_bytes": summary.stored_bytes if summary else None,
        "transforms": summary.transforms if summary else None,
        "entries": [entry.as_json() for entry in entries],
    }


# ── statistics ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def _show_statistics(checkpoint: str, globs: tuple[str, ...], *, as_json: bool) -> None:
    from asyncdcp.cli.statistics import measure  # numpy, which the tree does without

    async with opened(checkpoint) as reader:
        entries = chosen([entry for entry in entries_of(reader) if entry.is_tensor], globs)
        found = await measure(reader, entries)
    if as_json:
        say_json([{**entry.as_json(), **statistics.as_json()} for entry, statistics in found])
    else:
        say(table(_STATISTICS, [(shown(entry.name), *statistics.cells(entry)) for entry, statistics in found]))
