"""What an extension promises, as checks that any implementation can be put to.

    kit = ExtensionKit(lambda: MyExtension(level=3))

    @pytest.mark.parametrize("check", EXTENSION_CHECKS, ids=lambda check: check.__name__)
    def test_conformance(check):
        check(kit)

Each check raises ``AssertionError`` where a promise is broken. ``decode`` of damaged data may return anything that is
within its limit: a checksum finds damage before an extension sees it. What it must not do is crash or take memory.
"""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeAlias

import msgspec

from asyncdcp.errors import AsyncDCPError
from asyncdcp.extensions import BlockContext, Chain, Extension, ExtensionRegistry, extension_of, spec_of
from asyncdcp.format.blocks import BLOCK_BYTES, stored_limit
from asyncdcp.names import is_descriptor

_SAVE: Final = "0123456789abcdef0123"
_LENGTHS: Final = (1, 2, 7, 4095, 4096, 65_537, BLOCK_BYTES)
_ELEMENT_SIZES: Final = (1, 2, 4, 8, 16)
_SLACK: Final = 8 << 20
"""What a decoder may take besides the block: its tables and windows."""


@dataclass(frozen=True)
class ExtensionKit:
    """How the checks come by the extension: ``make`` gives a new one, equal to the last, each time."""

    make: Callable[[], Extension]


Check: TypeAlias = Callable[[ExtensionKit], None]


def context(block: int = 0, blocks: int = 4, element_size: int = 4) -> BlockContext:
    """A block's place; several blocks of one file."""
    return BlockContext(_SAVE, f"{_SAVE}-0-0.bin", block, blocks, element_size, stored_limit(BLOCK_BYTES))


def contents(length: int) -> Iterator[bytes]:
    """Blocks of a length: all zeros, noise, something that repeats, and each of these for a part."""
    noise = os.urandom(length)
    repeated = (b"one and the same " * (length // 17 + 1))[:length]
    half = length // 2
    yield bytes(length)
    yield noise
    yield repeated
    yield noise[:half] + bytes(length - half)
    yield repeated[:half] + noise[half:]


# ── the checks ──────────────────────────────────────────────────────────────────────────────────────────────────────


def it_has_a_descriptor(kit: ExtensionKit) -> None:
    """Of the right form, the same for equal ones, and it leads back to an extension of the same name."""
    extension = kit.make()
    descriptor = extension.get_descriptor()
    assert is_descriptor(descriptor), f"{descriptor!r} is not name[@domain]/version"
    name, _, version = descriptor.partition("/")
    assert name == extension.registry_name() == type(extension).registry_name()
    assert kit.make().get_descriptor() == descriptor, "equal extensions have different descriptors"
    assert extension.reader(version).registry_name() == name
    found = ExtensionRegistry([extension]).from_descriptor(descriptor)
    assert found.registry_name() == name


def an_unknown_version_is_refused(kit: ExtensionKit) -> None:
    """By a ValueError or an error of asyncdcp, which becomes one that names the descriptor."""
    try:
        kit.make().reader("999999999")
    except (ValueError, AsyncDCPError):
        return
    raise AssertionError("reader() takes a version that cannot exist")


def blocks_come_back(kit: ExtensionKit) -> None:
    """Of any length, content and element size, by what the descriptor leads to; and the input is left as it was."""
    extension = kit.make()
    chain = Chain([extension])
    reader = Chain([ExtensionRegistry([extension]).from_descriptor(extension.get_descriptor())])
    for length in _LENGTHS:
        for number, content in enumerate(contents(length)):
            given, place = bytearray(content), context(element_size=_ELEMENT_SIZES[number % 5])
            stored = bytes(chain.encode(memoryview(given), place))
            assert given == content, "encode changed the block that it was given"
            assert reader.decode(memoryview(stored), place, length) == content, f"{length} bytes came back different"


def several_threads_at_once(kit: ExtensionKit) -> None:
    """One instance encodes and decodes different blocks at the same time."""
    chain = Chain([kit.make()])

    def there_and_back(number: int) -> bool:
        content = os.urandom(20_000) + bytes([number]) * 100_000
        place = context(number % 4)
        stored = bytes(chain.encode(memoryview(content), place))
        return bool(chain.decode(memoryview(stored), place, len(content)) == content)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(there_and_back, range(32))), "a block came back different"


def damage_does_no_harm(kit: ExtensionKit) -> None:
    """Cut, flipped, swapped and made-up data is refused, or decoded to something of the right length; no more memory
    is taken than the limit says.
    """
    chain, place = Chain([kit.make()]), context()
    content = next(contents(BLOCK_BYTES))
    stored = bytes(chain.encode(memoryview(content), place))
    damaged = [stored[:-1], stored[: len(stored) // 2], stored[:1], stored + b"\0", stored + stored, os.urandom(100)]
    damaged += [_flipped(stored, place_) for place_ in range(0, len(stored) * 8, max(1, len(stored) * 8 // 64))]
    tracemalloc.start()
    try:
        for data in damaged:
            for length in (len(content), 10):
                try:
                    decoded = chain.decode(memoryview(data), place, length)
                except AsyncDCPError:
                    continue
                assert len(decoded) == length
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * stored_limit(BLOCK_BYTES) + _SLACK, f"decoding took {peak} bytes"


def an_equal_one_is_made_elsewhere(kit: ExtensionKit) -> None:
    """What ``travel`` returns goes through JSON and makes an extension whose blocks this one reads; or it is None."""
    extension = kit.make()
    if extension.travel() is None:
        return
    spec = spec_of(extension)
    assert spec is not None, "it has a travel(), and its class cannot be imported by another process"
    sent = msgspec.json.decode(msgspec.json.encode(spec), type=type(spec))
    other = extension_of(sent)
    assert other.get_descriptor() == extension.get_descriptor()
    content = os.urandom(5000) + bytes(5000)
    stored = bytes(Chain([other]).encode(memoryview(content), context()))
    assert Chain([extension]).decode(memoryview(stored), context(), len(content)) == content


def _flipped(data: bytes, bit: int) -> bytes:
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


EXTENSION_CHECKS: Final[tuple[Check, ...]] = (
    it_has_a_descriptor,
    an_unknown_version_is_refused,
    blocks_come_back,
    several_threads_at_once,
    damage_does_no_harm,
    an_equal_one_is_made_elsewhere,
)
