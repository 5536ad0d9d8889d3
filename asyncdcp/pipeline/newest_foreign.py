"""Checkpoints of other formats in the place of a run, which are no part of it."""

from __future__ import annotations

from anyio import CancelScope

from asyncdcp.errors import AsyncDCPError
from asyncdcp.pipeline.formats import open_checkpoint
from asyncdcp.runs.layout import step_of
from asyncdcp.runs.listing import Run
from asyncdcp.storage import Place


async def newest_foreign(place: Place, run: Run) -> str | None:
    """The folder of the highest step that holds a checkpoint of another format; None where there is none.

    For a message about a run that has nothing to resume from: only the highest ``step_<number>`` without a checkpoint
    of asyncdcp's is opened, and one that cannot be opened counts as none.
    """
    own = {checkpoint.name for checkpoint in run.checkpoints}
    steps = {name: step for name in run.survey.children if name not in own and (step := step_of(name)) is not None}
    newest = max(steps, key=lambda name: steps[name], default=None)
    if newest is None:
        return None
    try:
        reader = await open_checkpoint(place.child(newest), data=False)
    except AsyncDCPError:
        return None
    with CancelScope(shield=True):
        await reader.aclose()
    return newest
