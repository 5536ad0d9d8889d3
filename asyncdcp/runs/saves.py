"""The saves of a sub-place: what became of each, by its Record, and a view of one alone, for who was told which one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from asyncdcp.envelope import Unseal, decode_record
from asyncdcp.errors import CorruptCheckpoint, KeyUnavailable, MissingDependency
from asyncdcp.metadata import Record
from asyncdcp.names import belongs_to, file_save_id, record_save_id
from asyncdcp.storage import Contents, ObjectReader, ObjectWriter, Storage, StorageInfo


@dataclass(frozen=True)
class Outcomes:
    """Records by save id. Of those that cannot be read, why: ``broken`` ones are damaged, ``sealed`` ones are encrypted
    with a key that is not at hand, or do not open with it, and nothing is known of them but that they are there.
    """

    records: dict[str, Record] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    sealed: dict[str, str] = field(default_factory=dict)

    @property
    def live(self) -> list[Record]:
        """The commits that no other commit replaces."""
        replaced = self.replaced
        return [record for record in self._commits if record.save_id not in replaced]

    @property
    def replaced(self) -> set[str]:
        """What the commits that can be read take the place of."""
        return {save_id for record in self._commits for save_id in record.replaces}

    @property
    def _commits(self) -> list[Record]:
        return [record for record in self.records.values() if record.outcome == "commit"]


def read_outcomes(contents: Contents, unseal: Unseal) -> Outcomes:
    """The Records of a sub-place, from what a survey read."""
    found = Outcomes()
    for name in contents.objects:
        save_id = record_save_id(name)
        if save_id is None:
            continue
        try:
            record = decode_record(contents.read[name], name, unseal)
        except KeyError:
            found.broken[save_id] = contents.unread.get(name, f"{name} was not read")
        except CorruptCheckpoint as error:
            causes = found.sealed if _is_hidden(contents.read[name], name) else found.broken
            causes[save_id] = str(error)
        except (KeyUnavailable, MissingDependency) as error:
            found.sealed[save_id] = str(error)
        else:
            if record.save_id == save_id:
                found.records[save_id] = record
            else:
                found.broken[save_id] = f"{name}: says it is the Record of save {record.save_id[:40]!r}"
    return found


def _is_hidden(data: bytes, name: str) -> bool:
    """Whether a Record is encrypted, and as it was written: that it does not open may be the fault of the key."""
    try:
        decode_record(data, name)
    except KeyUnavailable:
        return True
    except CorruptCheckpoint:
        pass
    return False


def saves_of(contents: Contents) -> Mapping[str, dict[str, int]]:
    """The files of each save in a sub-place: names and bytes, by save id."""
    saves: dict[str, dict[str, int]] = defaultdict(dict)
    for name, found in contents.objects.items():
        save_id = file_save_id(name)
        if save_id is not None:
            saves[save_id][name] = found.size
    return dict(saves)


class SaveView:
    """A ``Storage`` that shows the files of one save only, so that it alone can be the checkpoint. Writes pass through.

    Two writers that did not know of each other can commit to one step; the run's lineage says which one counts, and
    the reader is to open that one.
    """

    def __init__(self, storage: Storage, save_id: str) -> None:
        self._storage = storage
        self.save_id = save_id

    @property
    def info(self) -> StorageInfo:
        return self._storage.info

    async def list(self) -> dict[str, int]:
        names = await self._storage.list()
        return {name: size for name, size in names.items() if belongs_to(name, self.save_id)}

    async def get(self, name: str, limit: int) -> bytes:
        return await self._storage.get(name, limit)

    async def open(self, name: str) -> ObjectReader:
        return await self._storage.open(name)

    async def create(self, name: str, length_hint: int) -> ObjectWriter:
        return await self._storage.create(name, length_hint)

    async def put(self, name: str, data: bytes) -> None:
        await self._storage.put(name, data)

    async def claim(self, name: str, data: bytes) -> bool:
        return await self._storage.claim(name, data)

    async def barrier(self) -> None:
        await self._storage.barrier()

    async def temporaries(self) -> dict[str, str]:
        found = await self._storage.temporaries()
        return {name: target for name, target in found.items() if belongs_to(target, self.save_id)}

    async def delete(self, names: Sequence[str]) -> None:
        await self._storage.delete(names)
