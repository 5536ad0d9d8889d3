"""``asyncdcp convert``: a checkpoint written anew in another format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click
from msgspec import to_builtins

from asyncdcp.cli.opening import hint
from asyncdcp.cli.output import say, say_json
from asyncdcp.cli.targets import AS_JSON, PLACE, open_storage_at, run
from asyncdcp.cli.text import count_text, good, shown, size_text
from asyncdcp.errors import CheckpointExists, CheckpointNotFound

if TYPE_CHECKING:
    from asyncdcp.interop.convert import Conversion, Format

_FORMATS = ("native", "dcp", "hf", "torch", "safetensors")
_LISTED = 5


@click.command()
@click.argument("source", metavar="SRC", type=PLACE)
@click.argument("target", metavar="DST", type=PLACE)
@click.option("--to", type=click.Choice(_FORMATS), default="native", show_default=True, help="The format of DST.")
@click.option("--keys", metavar="GLOB", multiple=True, help="Take only names that match; may be given several times.")
@click.option("--rename", metavar="OLD=NEW", multiple=True, help="Rename OLD, and what begins with OLD and a dot.")
@click.option("--dtype", metavar="DTYPE", help="What floating point numbers become, such as bfloat16.")
@click.option("--shard-bytes", metavar="N", type=click.IntRange(min=1), help="Bytes of a Hugging Face shard, at most.")
@click.option("--allow-pickle", is_flag=True, help="Take values that were stored with it. They can run code.")
@AS_JSON
def command(  # noqa: PLR0913  # each is a word of the command line
    source: str,
    target: str,
    to: Format,
    keys: Sequence[str],
    rename: Sequence[str],
    dtype: str | None,
    shard_bytes: int | None,
    *,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Write the checkpoint SRC anew as DST, in any format.

    SRC is a checkpoint of asyncdcp's, a directory of torch.distributed.checkpoint's, a Hugging Face folder, a
    .safetensors or a .pt file. DST is there whole, read again and compared, or not at all. An empty OLD, as in
    --rename =model, puts NEW before every name; an empty NEW, as in --rename model=, takes OLD away.
    """
    from asyncdcp.interop.convert import Changes
    from asyncdcp.interop.targets import SHARD_BYTES

    open_storage_at(source)
    changes = Changes(
        keys=keys or None,
        rename=dict(map(_rule, rename)) or None,
        dtype=dtype,
        shard_bytes=shard_bytes or SHARD_BYTES,
        allow_pickle=allow_pickle,
    )
    done = run(_convert, source, target, to, changes)
    if as_json:
        say_json(to_builtins(done))
    else:
        say(_lines(done))


async def _convert(source: str, target: str, to: Format, changes: object) -> Conversion:
    from asyncdcp.interop.convert import Changes, convert

    assert isinstance(changes, Changes)
    try:
        return await convert(source, target, to, changes)
    except CheckpointNotFound as error:
        raise click.ClickException(f"{error}{await hint(source, open_storage_at(source))}") from error
    except CheckpointExists as error:
        raise click.ClickException(f"{target} exists; choose another name, or remove it first") from error


def _rule(text: str) -> tuple[str, str]:
    old, separator, new = text.partition("=")
    if not separator:
        raise click.UsageError(f"--rename takes OLD=NEW, not {text!r}")
    return old, new


def _lines(done: Conversion) -> Iterator[str]:
    what = f"{count_text(done.tensors, 'tensor')}, {size_text(done.tensor_bytes)}, {count_text(done.values, 'value')}"
    yield f"{good('written')}  {shown(done.path)}  {what}, read again and compared"
    if done.left_out:
        names = ", ".join(map(shown, done.left_out[:_LISTED])) + (" …" if len(done.left_out) > _LISTED else "")
        yield f"left out, since the format holds tensors only: {names}"
