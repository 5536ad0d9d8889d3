"""From what a person typed to a look at a run, with a way out where it is none."""

from __future__ import annotations

import os

import click

from asyncdcp.cli.targets import open_folder
from asyncdcp.cli.text import shown
from asyncdcp.names import record_save_id
from asyncdcp.pipeline.newest_foreign import newest_foreign
from asyncdcp.runs import Checkpoint, Run, look
from asyncdcp.runs.layout import term_of
from asyncdcp.storage import Place, open_place


async def open_run(target: str) -> tuple[Place, Run]:
    """The place of a run and what is in it; an error if there is nothing of a run."""
    open_folder(target, "run")
    place = open_place(target)
    run = await look(place)
    if not run.checkpoints and not run.term:
        raise click.ClickException(_no_run(target, run) or await _foreign(place, target, run))
    return place, run


def note_of(checkpoint: Checkpoint) -> str:
    """What there is to say of one that is not simply there."""
    if checkpoint.state == "encrypted":
        return "cannot be read without its key"
    if checkpoint.cause is not None:
        return shown(checkpoint.cause)
    if checkpoint.state == "partial":
        return "under way, or cut off"
    return "" if checkpoint.on_line else "left behind by a rollback"


def _no_run(target: str, run: Run) -> str | None:
    if run.is_checkpoint():
        return f"{target} is a checkpoint, and no run; asyncdcp inspect {target} shows what is in it"
    inside = run.survey.children.items()
    runs = [name for name, found in inside if any(term_of(name) is not None for name in found.objects)]
    if runs:
        return f"{target} holds runs ({_shown(runs)}), and is none itself; such as: {os.path.join(target, min(runs))}"
    others = [name for name, found in inside if any(map(record_save_id, found.objects))]
    if others:
        return (
            f"{target} holds checkpoints ({_shown(others)}), but none named step_<number> as those of a run are; "
            f"to look into one: asyncdcp inspect {os.path.join(target, min(others))}"
        )
    return None


async def _foreign(place: Place, target: str, run: Run) -> str:
    """What to say where there is nothing of asyncdcp's: checkpoints of other formats are no run."""
    newest = await newest_foreign(place, run)
    if newest is not None:
        path = os.path.join(target, newest)
        return (
            f"{target} holds no run of asyncdcp's, but checkpoints of another format, such as {path}; "
            f"to look into one: asyncdcp inspect {path}"
        )
    return f"{target} holds no run: there is no folder step_<number> with a checkpoint in it"


def _shown(names: list[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (" …" if len(names) > 3 else "")
