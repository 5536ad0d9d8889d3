"""What an extension is, and how one travels: as typed data, so that the background process can make an equal one.

Names and descriptors are those of ``torch.distributed.checkpoint._extension``, so that a stream transform written for
DCP works here, block by block. What is sent to the background process comes from the trainer's own objects: the import
path of their class and its arguments. Nothing of that is ever read from a checkpoint.
"""

from __future__ import annotations

import abc
import sys
from collections.abc import Mapping
from functools import reduce
from importlib import import_module
from typing import IO, Any, ClassVar, Literal, NamedTuple, Self, TypeAlias

import msgspec

from asyncdcp.errors import AsyncDCPError, InvalidOption

Block: TypeAlias = bytes | bytearray | memoryview
"""What a transform returns: contiguous bytes, its own or a view of what it was given."""

Role: TypeAlias = Literal["transform", "compression", "encryption"]


def said(error: BaseException) -> str:
    """What an extension's error says; with its type, unless it was meant to be read."""
    return str(error) if isinstance(error, ValueError | AsyncDCPError) else f"{type(error).__name__}: {error}"


class BlockContext(NamedTuple):
    """Which block it is, the same when it is encoded and decoded; ``limit`` alone differs.

    ``file`` is the name of the data file, ``block`` the number of the block in it, of ``blocks`` in all.
    ``element_size`` is that of the numbers in the block (of those in its middle, where several kinds meet).
    ``limit`` is the most bytes that the call may return.
    """

    save_id: str
    file: str
    block: int
    blocks: int
    element_size: int
    limit: int


class Extension(abc.ABC):
    """The part that all extensions have: a name, and a descriptor that is kept in the checkpoint.

    Called from several threads at once, for different blocks.
    """

    role: ClassVar[Role] = "transform"
    """What it is good for: ``"compression"`` behind an ``"encryption"`` saves nothing, and warns
    (``ExtensionOrderWarning``).
    """

    @staticmethod
    @abc.abstractmethod
    def registry_name() -> str:
        """``name`` or ``name@domain``: what comes before the slash in its descriptors."""

    @staticmethod
    @abc.abstractmethod
    def from_descriptor(version: str) -> Extension:
        """The extension that decodes what was written under ``<registry name>/<version>``; ValueError for a version
        that it does not know.
        """

    @abc.abstractmethod
    def get_descriptor(self) -> str:
        """``name[@domain]/version``. It is stored in clear, so it must hold no secret."""

    def reader(self, version: str) -> Extension:
        """As ``from_descriptor``, with what this instance knows, such as its keys. Used by a load whose checkpointer
        was given this instance.
        """
        return type(self).from_descriptor(version)

    def travel(self) -> Mapping[str, Any] | None:
        """What makes an equal extension in the background process: keyword arguments for its class, as JSON can carry
        them. None, the default, if it cannot travel; saves run on a thread then.
        """
        return None

    @classmethod
    def arrive(cls, arguments: Mapping[str, Any]) -> Self:
        """The inverse of ``travel``, called in the background process."""
        return cls(**arguments)


class BlockExtension(Extension):
    """An extension that takes a block at a time, whole. Let long work release the GIL.

    >>> class Flipped(asyncdcp.BlockExtension):
    ...     @staticmethod
    ...     def registry_name() -> str:
    ...         return "block.flipped@example.org"
    ...     @staticmethod
    ...     def from_descriptor(version: str) -> "Flipped":
    ...         return Flipped()
    ...     def get_descriptor(self) -> str:
    ...         return f"{self.registry_name()}/1"
    ...     def encode(self, data: memoryview, context: asyncdcp.BlockContext) -> bytes:
    ...         return bytes(data).translate(bytes(range(255, -1, -1)))
    ...     decode = encode
    >>> with asyncdcp.SyncCheckpointer(process=False, extensions=[Flipped()]) as checkpointer:
    ...     _ = checkpointer.save("flipped", {"weight": torch.ones(3)})
    ...     print(checkpointer.load("flipped"))
    {'weight': tensor([1., 1., 1.])}
    """

    @abc.abstractmethod
    def encode(self, data: memoryview, context: BlockContext) -> Block:
        """The block as it is to be stored, 1 to ``context.limit`` bytes, in memory that is not used again for another.
        ``data`` is good only during the call, but may be returned, or a part of it.
        """

    @abc.abstractmethod
    def decode(self, data: memoryview, context: BlockContext) -> Block:
        """What ``encode`` was given.

        ``data`` may be anything: raise (what you like, but rather ``ValueError``) for what was not encoded so, and do
        not take memory by what it says before you know that it is within ``context.limit``.
        """


class StreamTransformExtension(Extension):
    """An extension that transforms a stream of bytes; here each block is a stream of its own.

    >>> import gzip
    >>> class GZip(asyncdcp.StreamTransformExtension):
    ...     @staticmethod
    ...     def registry_name() -> str:
    ...         return "stream.gzip@example.org"
    ...     @staticmethod
    ...     def from_descriptor(version: str) -> "GZip":
    ...         return GZip()
    ...     def get_descriptor(self) -> str:
    ...         return f"{self.registry_name()}/1"
    ...     def transform_to(self, output):
    ...         return gzip.GzipFile(fileobj=output, mode="wb")
    ...     def transform_from(self, input):
    ...         return gzip.GzipFile(fileobj=input)
    >>> with asyncdcp.SyncCheckpointer(process=False, extensions=[GZip()]) as checkpointer:
    ...     _ = checkpointer.save("zipped", {"weight": torch.ones(3)})
    ...     print(checkpointer.load("zipped"))
    {'weight': tensor([1., 1., 1.])}
    """

    @abc.abstractmethod
    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        """A stream to write to: what is written, and flushed by its ``close``, comes out transformed at ``output``."""

    @abc.abstractmethod
    def transform_from(self, input: IO[bytes]) -> IO[bytes]:
        """A stream to read from, which reads ``input`` and gives what was written once."""


class SealingExtension(BlockExtension):
    """An encryption that also vouches for the Record and the indexes. ``name`` is a file's, and bound in."""

    @abc.abstractmethod
    def seal(self, body: bytes, save_id: str, name: str) -> tuple[bytes, bytes | None]:
        """A token by which ``unseal`` knows the body again, and the body encrypted, None where it stays in clear."""

    @abc.abstractmethod
    def unseal(self, token: bytes, body: bytes, save_id: str, name: str, *, hidden: bool) -> bytes:
        """The body, which is encrypted where ``hidden``; ValueError if it is not what was sealed."""


class ExtensionSpec(msgspec.Struct, frozen=True):
    """The class ``name`` of ``module``, to be made by its ``arrive(arguments)``. The arguments may hold secrets."""

    module: str
    name: str
    arguments: dict[str, Any]

    def __repr__(self) -> str:
        return f"ExtensionSpec({self.module}.{self.name})"


def spec_of(extension: Extension) -> ExtensionSpec | None:
    """The extension's spec; None if it says that it cannot travel, or its class cannot be imported elsewhere."""
    kind, arguments = type(extension), extension.travel()
    if arguments is None or kind.__module__ == "__main__" or _found(sys.modules.get(kind.__module__), kind) is not kind:
        return None
    try:
        plain = msgspec.json.decode(msgspec.json.encode(dict(arguments)))
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidOption(
            f"{kind.__qualname__}.travel() returned what JSON cannot carry; let it return keyword arguments of plain "
            "values, or None"
        ) from error
    return ExtensionSpec(kind.__module__, kind.__qualname__, plain)


def extension_of(spec: ExtensionSpec) -> Extension:
    """The extension of a spec. ``InvalidOption`` if it cannot be made here."""
    try:
        kind = reduce(getattr, spec.name.split("."), import_module(spec.module))
        made = kind.arrive(spec.arguments)
    except Exception as error:
        raise InvalidOption(
            f"the extension {spec.module}.{spec.name} could not be made in the background process "
            f"({type(error).__name__}: {error}); make its module importable there, or use process=False"
        ) from error
    if not isinstance(made, Extension):
        raise InvalidOption(f"{spec.module}.{spec.name}.arrive() returned no extension, but {type(made).__qualname__}")
    return made


def _found(module: Any, kind: type[Extension]) -> Any:
    try:
        return reduce(getattr, kind.__qualname__.split("."), module)
    except AttributeError:  # a class made in a function, or replaced since
        return None
