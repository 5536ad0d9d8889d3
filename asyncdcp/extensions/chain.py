"""Chain: a checkpointer's extensions, in the order in which a save applies them."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import combinations
from typing import IO, cast

from asyncdcp.envelope import Seal
from asyncdcp.errors import AsyncDCPError, CorruptCheckpoint, ExtensionOrderWarning, InvalidOption, UsageError
from asyncdcp.extensions.base import (
    Block,
    BlockContext,
    BlockExtension,
    Extension,
    ExtensionSpec,
    SealingExtension,
    StreamTransformExtension,
    said,
    spec_of,
)
from asyncdcp.names import is_descriptor
from asyncdcp.warn import warn_caller


class Chain:
    """Applies extensions to blocks, the first one first; decodes the other way round. From several threads at once.

    ``InvalidOption`` for what is no extension.
    """

    def __init__(self, extensions: Sequence[Extension]) -> None:
        if not isinstance(extensions, Iterable):
            raise InvalidOption(f"extensions takes a sequence of them, such as [ZStandard()], not {extensions!r:.80}")
        self.extensions = tuple(extensions)
        self.descriptors = [_descriptor(extension) for extension in self.extensions]
        self._sealing = next((e for e in reversed(self.extensions) if isinstance(e, SealingExtension)), None)

    def __bool__(self) -> bool:
        return bool(self.extensions)

    @property
    def seals(self) -> bool:
        """Whether Record and indexes of its saves are authenticated."""
        return self._sealing is not None

    def sealer(self, save_id: str) -> Callable[[bytes, str], tuple[Seal, bytes]] | None:
        """What seals the bodies of a save's Record and indexes; None where nothing does."""
        extension = self._sealing
        if extension is None:
            return None

        def seal(body: bytes, name: str) -> tuple[Seal, bytes]:
            token, hidden = extension.seal(body, save_id, name)
            made = Seal(extension.get_descriptor(), token.hex(), hidden is not None)
            return made, body if hidden is None else hidden

        return seal

    @property
    def specs(self) -> list[ExtensionSpec] | None:
        """What makes an equal chain in the background process; None where an extension cannot travel. Keys are asked
        for now (``KeyUnavailable``).
        """
        return None if self.staying else [spec for spec in self._specs if spec is not None]

    @property
    def staying(self) -> list[str]:
        """The descriptors of the extensions that cannot travel."""
        return [descriptor for descriptor, spec in zip(self.descriptors, self._specs, strict=True) if spec is None]

    @cached_property
    def _specs(self) -> list[ExtensionSpec | None]:
        return [spec_of(extension) for extension in self.extensions]

    def warn_of_order(self) -> None:
        """Warns (``ExtensionOrderWarning``) where an encryption leaves nothing to compress; that works, and saves
        nothing.
        """
        for first, second in combinations(self.extensions, 2):
            if first.role == "encryption" and second.role == "compression":
                warn_caller(
                    f"{second.registry_name()} comes after {first.registry_name()}: what is encrypted does not "
                    "compress. Extensions are applied left to right; put the encryption last",
                    ExtensionOrderWarning,
                )

    def encode(self, data: memoryview, context: BlockContext) -> memoryview:
        """The stored form of a block, of 1 to ``context.limit`` bytes. May be a view of ``data``."""
        for extension, descriptor in zip(self.extensions, self.descriptors, strict=True):
            try:
                data = _view(_encode(extension, data, context))
                if not 0 < len(data) <= context.limit:
                    raise ValueError(f"it made {len(data)} bytes, and 1 to {context.limit} are allowed")
            except (AsyncDCPError, MemoryError):
                raise
            except BaseException as error:  # SystemExit would end the loop; a CancelledError, pass for none
                what = f"{descriptor} failed at block {context.block} of {context.file}: {said(error)}"
                raise AsyncDCPError(what, path=context.file) from error
        return data

    def decode(self, data: memoryview, context: BlockContext, length: int) -> memoryview:
        """The block again, of exactly ``length`` bytes. ``CorruptCheckpoint`` if it is not; what the user is to mend,
        such as ``KeyUnavailable``, is no damage.
        """
        for number in reversed(range(len(self.extensions))):
            step = context._replace(limit=context.limit if number else length)
            try:
                data = _view(_decode(self.extensions[number], data, step))
                if len(data) > step.limit:
                    raise ValueError(f"it made {len(data)} bytes of at most {step.limit}")
            except (UsageError, MemoryError):
                raise
            except BaseException as error:  # as above
                raise _undecodable(self.descriptors[number], context, said(error)) from error
        if len(data) != length:
            raise _undecodable(self.descriptors[0], context, f"it has {len(data)} bytes of {length}")
        return data


def _descriptor(extension: Extension) -> str:
    kinds = (BlockExtension, StreamTransformExtension)
    if not isinstance(extension, kinds):
        raise InvalidOption(
            f"extensions takes instances of BlockExtension and StreamTransformExtension, not {extension!r}"
        )
    descriptor = extension.get_descriptor()
    if not is_descriptor(descriptor) or descriptor.partition("/")[0] != extension.registry_name():
        raise InvalidOption(
            f"the descriptor of {type(extension).__qualname__} is {descriptor!r}; it takes name[@domain]/version, "
            f"with the registry name {extension.registry_name()!r} for name[@domain]"
        )
    return descriptor


def _encode(extension: Extension, data: memoryview, context: BlockContext) -> Block:
    if isinstance(extension, BlockExtension):
        return extension.encode(data, context)
    assert isinstance(extension, StreamTransformExtension)
    return encode_stream(extension, data)


def _decode(extension: Extension, data: memoryview, context: BlockContext) -> Block:
    if isinstance(extension, BlockExtension):
        return extension.decode(data, context)
    assert isinstance(extension, StreamTransformExtension)
    return decode_stream(extension, data, context.limit)


def _view(block: Block) -> memoryview:
    return memoryview(block).cast("B")


def _undecodable(descriptor: str, context: BlockContext, why: str) -> CorruptCheckpoint:
    what = f"{context.file}: block {context.block} cannot be decoded by {descriptor}: {why}"
    return CorruptCheckpoint(what, path=context.file)


def encode_stream(extension: StreamTransformExtension, data: memoryview) -> bytes:
    """The whole stream that ``data`` becomes."""
    collected = _Collected()
    stream = extension.transform_to(cast("IO[bytes]", collected))
    position = 0
    while position < len(data):
        position += stream.write(data[position:]) or _stuck()
    stream.close()
    return collected.getvalue()


def decode_stream(extension: StreamTransformExtension, data: memoryview, limit: int) -> bytes:
    """What a stream holds; ValueError where that is more than ``limit`` bytes."""
    decoded = bytearray()
    with extension.transform_from(io.BytesIO(data)) as stream:
        while part := stream.read(limit + 1 - len(decoded)):
            decoded += part
            if len(decoded) > limit:
                raise ValueError(f"it holds more than {limit} bytes")
    return bytes(decoded)


class _Collected(io.BytesIO):
    """Can be read after it was closed: a transform may close what it writes to, or only flush it."""

    def close(self) -> None:
        pass


def _stuck() -> int:
    raise ValueError("the stream takes no more bytes")


PLAIN = Chain(())
"""No extensions: blocks are stored as they are."""
