"""Extensions: what turns the blocks of data files into something smaller or something secret, and back.

Nothing here imports torch, and third-party libraries are imported when they are first used.
"""

from asyncdcp.extensions.aesgcm import AESGCM
from asyncdcp.extensions.base import (
    BlockContext,
    BlockExtension,
    Extension,
    ExtensionSpec,
    StreamTransformExtension,
    extension_of,
    spec_of,
)
from asyncdcp.extensions.chain import PLAIN, Chain
from asyncdcp.extensions.planes import BytePlanes
from asyncdcp.extensions.registry import ExtensionRegistry, Seals, known_extensions
from asyncdcp.extensions.zstd import ZStandard

__all__ = [
    "AESGCM",
    "PLAIN",
    "BlockContext",
    "BlockExtension",
    "BytePlanes",
    "Chain",
    "Extension",
    "ExtensionRegistry",
    "ExtensionSpec",
    "Seals",
    "StreamTransformExtension",
    "ZStandard",
    "extension_of",
    "known_extensions",
    "spec_of",
]
