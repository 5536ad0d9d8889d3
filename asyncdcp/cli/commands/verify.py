"""``asyncdcp verify``: reads every stored byte of checkpoints; the exit status says whether all is well."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import click
from msgspec import to_builtins

from asyncdcp.cli.opening import opened
from asyncdcp.cli.output import DIFFERENT, TROUBLE, say, say_json, shown_progress
from asyncdcp.cli.targets import AS_JSON, PLACE, open_storage_at, run
from asyncdcp.cli.text import bad, count_text, describe, dim, good, seconds_text, shown, size_text
from asyncdcp.errors import CheckpointNotFound
from asyncdcp.pipeline.verify import verify
from asyncdcp.results import VerifyReport
from asyncdcp.storage import LocalStorage

_SHOWN = 20


@click.command()
@click.argument("checkpoints", metavar="CKPT...", type=PLACE, nargs=-1, required=True)
@AS_JSON
def command(checkpoints: tuple[str, ...], *, as_json: bool) -> int:
    """Read every byte of checkpoints and compare it with its checksum.

    The exit status is 0 if all are whole, 1 if one is damaged, 2 if one could not be looked at. Data files are read as
    they are stored, so neither keys nor extensions are needed.
    """
    status, reports = 0, []
    for checkpoint in checkpoints:
        try:
            report = run(_verify, checkpoint)
        except Exception as error:  # the others are looked at all the same
            if len(checkpoints) == 1:
                raise
            click.echo(f"asyncdcp: {describe(error)}", err=True)
            status = TROUBLE
            continue
        reports.append(report)
        if not report.ok:
            status = max(status, DIFFERENT)
        if not as_json:
            say(_lines(checkpoint, report))
    if as_json:
        say_json([{"ok": report.ok, **to_builtins(report)} for report in reports])
    return status


async def _verify(checkpoint: str) -> VerifyReport:
    storage = open_storage_at(checkpoint)
    with shown_progress("verifying", None) as trace:
        if not (isinstance(storage, LocalStorage) and storage.is_file()):  # a file can only be of another format
            with suppress(CheckpointNotFound):
                return await verify(storage, trace)
        async with opened(checkpoint):  # raises, with a hint, if there is none of any format
            raise click.ClickException(
                f"{checkpoint} is of another format, which asyncdcp has no checksums of; "
                f"asyncdcp convert {checkpoint} DST makes a checkpoint that has them"
            )


def _lines(checkpoint: str, report: VerifyReport) -> Iterator[str]:
    rate = report.bytes / max(report.seconds, 1e-9)
    what = f"{size_text(report.bytes)} in {count_text(report.files, 'file')}, {count_text(report.blocks, 'block')}"
    time = f"{seconds_text(report.seconds)}, {size_text(int(rate))}/s"
    yield f"{good('whole  ') if report.ok else bad('damaged')}  {shown(checkpoint)}  {dim(f'{what}, {time}')}"
    for damage in report.damages[:_SHOWN]:
        yield f"         {shown(damage.message)}"
    if len(report.damages) > _SHOWN:
        yield f"         … and {len(report.damages) - _SHOWN:,} more; --json lists all"
