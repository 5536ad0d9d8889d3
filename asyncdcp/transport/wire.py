"""The wire protocol of a transfer: what is said, in which frames, in which order. No I/O, no tensors, no pickle.

Between the sender S of a state and each receiver R there is one order in which messages follow each other, the same
seen from both ends, so that it holds on links that know no tags (NCCL) too; but for ``taken``::

    S → R   message    Offer
    R → S   message    Accept, or Failure: then it is over, and nothing of the state has moved
    S → R   tick 1, tick 2
            for each batch n = 1, 2, …:    its blocks, then tick n + 2; and if Accept says ``shared``:
    R → S   taken n
            ticks have a verdict. STOP is repeated by all later ticks, and after the second one comes
            message    Failure, and it is over
    R → S   message    Done (all has arrived, and verifies), or Failure

- A *message* is a head (magic, version, length and digest of what follows) and a struct as JSON.
- A *block* is bare bytes, a run of the stream of which the Offer says everything: the tensors' chunks lie in it one
  after another. Up to ``BATCH_BLOCKS`` blocks are a *batch*.
- ``shared``: both map the memory that Offer names. The blocks lie there, each in its slot, and are not sent: tick n + 2
  says that batch n is there, *taken* n that it is not needed any more, and its slots are those of batch n + 2. Both
  directions are then used at a time, in no one order: only links that say ``may_share`` are offered it.
- A *tick* has a fixed size. ``GO`` in tick n licenses batch n: before it is heard, no receive is posted for the batch.
  Two ticks go ahead, so two batches are on their way at a time. Tick n carries the checksums (XXH3-64) of the blocks
  of batch n - 2. So a sender that fails ends the transfer in an orderly way, and the link can be used again.

A receiver that fails goes on taking blocks to the end, throws them away, and says so in its last message.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec
import xxhash

from asyncdcp.errors import CorruptCheckpoint, PeerError, UnsupportedFormat
from asyncdcp.metadata import ChunkColumns
from asyncdcp.worker.protocol import ErrorFrame

VERSION: Final = 1
BATCH_BLOCKS: Final = 8
AHEAD: Final = 2
"""How many batches are on their way at a time."""
MESSAGE_LIMIT: Final = 4 << 30
BLOCK_LIMIT: Final = 1 << 30

_MAGIC: Final = b"adcpxfer"
_HEAD: Final = struct.Struct("<8sHxxxxxxQQ")
_TICK: Final = struct.Struct(f"<QQ{BATCH_BLOCKS}Q")
_SEAL: Final = struct.Struct("<Q")
_TAKEN: Final = struct.Struct("<8sQ")
_TAKEN_MAGIC: Final = b"adcptook"

HEAD_BYTES: Final = _HEAD.size
TICK_BYTES: Final = _TICK.size + _SEAL.size
TAKEN_BYTES: Final = _TAKEN.size


# ── messages ────────────────────────────────────────────────────────────────────────────────────────────────────────


class StreamPlan(msgspec.Struct, frozen=True):
    """What follows from the structure of the state alone; encoded once and kept.

    ``names``, ``dtypes`` and ``shapes`` are of the whole (unsharded) tensors; ``chunks`` what the sender holds of them,
    in the order of the stream; ``blocks`` are the stream's blocks by their bytes. ``tree`` is as in an Index.
    """

    names: list[str]
    dtypes: list[str]
    shapes: list[tuple[int, ...]]
    aliases: dict[str, str]
    chunks: ChunkColumns
    blocks: list[int]
    tree: msgspec.Raw


class SharedMemory(msgspec.Struct, frozen=True):
    """A descriptor of a process, and the bytes by which its memory is known. See ``shared.py`` for what lies where."""

    pid: int
    fd: int
    slot_bytes: int
    key: bytes


class Offer(msgspec.Struct, frozen=True, tag=True):
    """``plan`` is a ``StreamPlan``, ``values`` are plain values by name, as in an Index. Without ``checksums`` those in
    the ticks mean nothing. ``shared``: where a receiver on the same host may take the blocks from.
    """

    rank: int
    checksums: bool
    plan: msgspec.Raw
    values: msgspec.Raw
    shared: SharedMemory | None = None


class Accept(msgspec.Struct, frozen=True, tag=True):
    """The state fits, and its blocks may come: by the offer's shared memory, or over the link."""

    rank: int
    shared: bool = False


class Done(msgspec.Struct, frozen=True, tag=True):
    """Every block has arrived and was verified."""

    bytes: int


class Failure(msgspec.Struct, frozen=True, tag=True):
    """The side that says so gave the transfer up."""

    error: ErrorFrame


Message: TypeAlias = Offer | Accept | Done | Failure


class Head(NamedTuple):
    """What precedes a message: its length, and the XXH3-64 of its bytes."""

    length: int
    digest: int


def encode(message: Message) -> tuple[bytes, bytes]:
    """Head and body."""
    body = msgspec.json.encode(message)
    return _HEAD.pack(_MAGIC, VERSION, len(body), xxhash.xxh3_64_intdigest(body)), body


def decode_head(data: bytes | memoryview, peer: int) -> Head:
    """``PeerError`` if it is none, or of another version: all versions have the same head."""
    magic, version, length, digest = _HEAD.unpack(data)
    if magic != _MAGIC:
        raise PeerError(f"rank {peer} sent something that is no message of a transfer; is the group in use?", rank=peer)
    if version != VERSION:
        raise UnsupportedFormat(
            f"rank {peer} speaks version {version} of the transfer protocol, and this one version {VERSION}; use the "
            "same asyncdcp on both",
            rank=peer,
        )
    if length > MESSAGE_LIMIT:
        raise PeerError(f"rank {peer} announces a message of {length} bytes", rank=peer)
    return Head(length, digest)


def decode(head: Head, body: bytes | memoryview, peer: int) -> Message:
    """``CorruptCheckpoint`` if it is damaged or malformed."""
    if xxhash.xxh3_64_intdigest(body) != head.digest:
        raise CorruptCheckpoint(f"a message of rank {peer} does not match its checksum", rank=peer)
    message: Message = _decoded(body, Message, peer)
    return message


def decode_plan(offer: Offer) -> StreamPlan:
    """Schema-checked only; ``offered.py`` checks what the numbers mean."""
    plan: StreamPlan = _decoded(offer.plan, StreamPlan, offer.rank)
    return plan


def decode_values(offer: Offer) -> dict[str, msgspec.Raw]:
    """As ``decode_plan``."""
    values: dict[str, msgspec.Raw] = _decoded(offer.values, dict[str, msgspec.Raw], offer.rank)
    return values


def _decoded(data: bytes | memoryview | msgspec.Raw, kind: Any, peer: int) -> Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptCheckpoint(f"a message of rank {peer} is malformed ({error!s:.200})", rank=peer) from error


# ── ticks ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Verdict(IntEnum):
    """What a tick says of its batch, if there is one."""

    GO = 1
    STOP = 2


class Tick(NamedTuple):
    """Number ``number``, from 1 on; ``digests`` are those of batch ``number - 2``."""

    number: int
    verdict: Verdict
    digests: tuple[int, ...] = ()


def encode_tick(tick: Tick) -> bytes:
    """Always ``TICK_BYTES``."""
    filler = (0,) * (BATCH_BLOCKS - len(tick.digests))
    data = _TICK.pack(tick.number, tick.verdict, *tick.digests, *filler)
    return data + _SEAL.pack(xxhash.xxh3_64_intdigest(data))


def decode_tick(data: bytes | memoryview, number: int, peer: int) -> Tick:
    """The tick, which must be number ``number``; ``CorruptCheckpoint`` otherwise."""
    content = bytes(data[: _TICK.size])
    [seal] = _SEAL.unpack(data[_TICK.size :])
    found, verdict, *digests = _TICK.unpack(content)
    if seal != xxhash.xxh3_64_intdigest(content) or found != number or verdict not in Verdict.__members__.values():
        raise CorruptCheckpoint(f"rank {peer} sent something else than tick {number}", rank=peer)
    return Tick(found, Verdict(verdict), tuple(digests))


def encode_taken(number: int) -> bytes:
    """Always ``TAKEN_BYTES``."""
    return _TAKEN.pack(_TAKEN_MAGIC, number)


def check_taken(data: bytes | memoryview, number: int, peer: int) -> None:
    """``CorruptCheckpoint`` if it is not about batch ``number``."""
    if _TAKEN.unpack(data) != (_TAKEN_MAGIC, number):
        raise CorruptCheckpoint(f"rank {peer} sent something else than that it has taken batch {number}", rank=peer)


def batches(blocks: Sequence[Any]) -> list[range]:
    """The numbers of the blocks of each batch."""
    return [range(begin, min(begin + BATCH_BLOCKS, len(blocks))) for begin in range(0, len(blocks), BATCH_BLOCKS)]
