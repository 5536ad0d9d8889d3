"""The public kit, put to every built-in extension and to a user's; and that it finds what breaks a promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from asyncdcp import AESGCM, BlockContext, BytePlanes, Extension, ZStandard
from asyncdcp.errors import AsyncDCPError
from asyncdcp.extensions import planes
from asyncdcp.testing.extensions import EXTENSION_CHECKS, Check, ExtensionKit
from tests.extensions.samples import Xor, Zlib

KEY = bytes(range(32))
KITS: dict[str, Callable[[], Extension]] = {
    "zstd": ZStandard,
    "zstd-19": lambda: ZStandard(7),
    "planes": BytePlanes,
    "aesgcm": lambda: AESGCM(KEY),
    "hidden": lambda: AESGCM(lambda _: KEY, key_id="mine", hide_metadata=True),
    "own": Xor,
    "stream": Zlib,
}


@pytest.mark.parametrize("name", KITS)
@pytest.mark.parametrize("check", EXTENSION_CHECKS, ids=lambda check: check.__name__)
def test_conformance(check: Check, name: str) -> None:
    check(ExtensionKit(KITS[name]))


@pytest.mark.parametrize("check", EXTENSION_CHECKS, ids=lambda check: check.__name__)
def test_planes_without_numpy(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planes, "_numpy", lambda: None)
    check(ExtensionKit(BytePlanes))


class Broken(Xor):
    """Breaks one promise, by ``fault``."""

    fault = ""

    def get_descriptor(self) -> str:
        return "no descriptor" if self.fault == "it_has_a_descriptor" else super().get_descriptor()

    def reader(self, version: str) -> Extension:
        return self if self.fault == "an_unknown_version_is_refused" else super().reader(version)

    def encode(self, data: memoryview, context: BlockContext) -> bytes:
        if self.fault == "blocks_come_back":
            data[0] = 0
        return super().encode(data, context)

    def decode(self, data: memoryview, context: BlockContext) -> bytes:
        if self.fault == "several_threads_at_once" and context.block == 3:
            return bytes(len(data))
        if self.fault == "damage_does_no_harm":
            bytearray(20 << 20)
        return super().decode(data, context)

    def travel(self) -> dict[str, Any] | None:
        return {"key": 1 if self.fault == "an_equal_one_is_made_elsewhere" else self.key}


@pytest.mark.parametrize("check", EXTENSION_CHECKS, ids=lambda check: check.__name__)
def test_the_kit_finds_what_breaks_a_promise(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    check(ExtensionKit(Broken))
    monkeypatch.setattr(Broken, "fault", check.__name__)
    with pytest.raises((AssertionError, AsyncDCPError)):
        check(ExtensionKit(Broken))
