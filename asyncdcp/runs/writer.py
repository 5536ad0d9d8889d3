"""RunWriter: the one writer of a run. It claims a term, settles what is in flight, and looks whether it is fenced."""

from __future__ import annotations

import os
import platform
import time
from errno import EACCES, EPERM, EROFS
from typing import Final

from asyncdcp.errors import Fenced, StorageError
from asyncdcp.extensions import ExtensionRegistry
from asyncdcp.runs.collection import delete_checkpoint
from asyncdcp.runs.layout import (
    UNCLAIMED,
    Line,
    LineStart,
    TermClaim,
    current_line,
    encode_claim,
    encode_line,
    line_name,
    line_term_of,
    term_name,
    term_of,
)
from asyncdcp.runs.listing import Checkpoint, Known, Run, look
from asyncdcp.runs.retention import Retention, to_delete
from asyncdcp.runs.settling import Settled, settle_saves
from asyncdcp.storage import Place

_NO_RIGHT: Final = (EACCES, EPERM, EROFS)


class RunWriter:
    """Writes to a run in a term of its own. Used on one event loop, by one task at a time.

    A term has a line once ``go_on`` was called: before that nothing may be saved in it. ``line`` is that of the
    checkpoints that count for this writer, whoever else has claimed the run since.
    """

    def __init__(self, place: Place, registry: ExtensionRegistry | None = None) -> None:
        self.place = place
        self._registry = registry
        self.term = UNCLAIMED
        self.line = Line(UNCLAIMED, {})
        self.begun = False
        self._known = Known()

    async def open(self, *, quiet: float, deadline: float) -> tuple[Run, Settled]:
        """Claims the run's next term, then settles what earlier ones still have in flight (see settling.py).

        Before anything is claimed, ``KeyUnavailable`` where the newest checkpoint is encrypted and cannot be told, and
        ``InvalidOption`` where the place is a checkpoint.
        """
        before = await look(self.place, self._known, self._registry)
        before.refuse_checkpoint()
        before.latest()
        names = before.survey.own.objects
        taken = [number for name in names for number in (term_of(name), line_term_of(name)) if number is not None]
        self.term = max(taken, default=UNCLAIMED) + 1
        while not await self._claim(self.term):
            self.term += 1  # another one opens the run just now, and will be fenced
        settled = await settle_saves(self.place, self.term, quiet=quiet, deadline=deadline)
        run = await look(self.place, self._known, self._registry)
        self.line = run.line
        self._check(run)
        return run, settled

    async def go_on(self, base: Checkpoint | None) -> None:
        """From here on saves go on from ``base``, a good checkpoint of this line; None where there is none.

        What lies on the line beyond it is off the line from now on, durably. A second call in a term claims the next
        one. ``Fenced`` if another has.
        """
        if self.begun:
            if not await self._claim(self.term + 1):
                raise self._fenced(self.term + 1)
            self.term, self.begun = self.term + 1, False
        start = self.line.going_on(self.term, None if base is None else (base.save_id or "", base.step))
        await self._write(start)
        self.line = current_line([start], ())
        self.begun = True

    async def look(self) -> Run:
        """The run as it is. ``Fenced`` if another writer has claimed it."""
        run = await look(self.place, self._known, self._registry)
        self._check(run)
        return run

    async def retain(self, policy: Retention, run: Run, durable: int, *, spared: str | None = None) -> list[Checkpoint]:
        """Deletes what the policy does not keep, oldest first; returns it. The newest good checkpoint always stays, and
        for now the save ``spared``.

        ``run`` was looked at just now by this writer. Steps beyond ``durable`` count for nothing: a Record can be seen
        before it is sure to survive a loss of power, and until then nothing may be deleted for its sake.
        """
        gone = to_delete(policy, [checkpoint for checkpoint in run.checkpoints if checkpoint.step <= durable])
        gone = [checkpoint for checkpoint in gone if checkpoint.save_id != spared]
        for checkpoint in gone:
            assert checkpoint.save_id is not None
            await delete_checkpoint(self.place, checkpoint.name, checkpoint.save_id, self._registry)
        return gone

    async def _claim(self, term: int) -> bool:
        claim = TermClaim(term, time.time(), platform.node(), os.getpid())
        try:
            return await self.place.storage.claim(term_name(term), encode_claim(claim))
        except StorageError as error:
            if error.errno in _NO_RIGHT:
                error.args = (f"{error}; a run that is only to be read is opened with read_only=True",)
            raise

    async def _write(self, start: LineStart) -> None:
        await self.place.storage.put(line_name(start.term), encode_line(start))
        await self.place.storage.barrier()

    def _check(self, run: Run) -> None:
        if run.term > self.term:
            raise self._fenced(run.term)

    def _fenced(self, term: int) -> Fenced:
        location = self.place.storage.info.location
        return Fenced(
            f"another writer has taken {location} over with term {term}, and this one has term {self.term}: what it "
            "still commits does not count. End this one; or open the run anew if it is the one to go on",
            path=location,
            term=term,
        )
