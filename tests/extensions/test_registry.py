"""Names, orders, what travels, and keys: errors that say what is wrong and what to do."""

from __future__ import annotations

import asyncio
import base64
import warnings
from functools import partial
from importlib.metadata import EntryPoint, EntryPoints
from typing import Any

import pytest

from asyncdcp import (
    AESGCM,
    AsyncCheckpointer,
    BytePlanes,
    CheckpointManager,
    ExtensionRegistry,
    SyncCheckpointer,
    ZStandard,
)
from asyncdcp.envelope import Seal
from asyncdcp.errors import (
    AsyncDCPError,
    CorruptCheckpoint,
    ExtensionOrderWarning,
    InvalidOption,
    KeyUnavailable,
    UnsupportedFormat,
)
from asyncdcp.extensions import Chain, Seals, registry, spec_of
from asyncdcp.extensions.aesgcm import key_name
from asyncdcp.testing.extensions import context
from tests.extensions.samples import Xor, Zlib

KEY, OTHER = bytes(range(32)), bytes(32)


def test_built_in_ones_are_known_by_the_names_of_dcp() -> None:
    descriptors = ["stream.zstd/1", "block.planes/1"]
    assert [type(each) for each in ExtensionRegistry().from_descriptor_list(descriptors)] == [ZStandard, BytePlanes]


def test_a_key_may_be_asked_for_while_it_is_being_asked_for() -> None:
    asked: list[str] = []

    def provider(key_id: str) -> bytes:
        asked.append(key_id)
        if len(asked) == 1:  # a signal's handler saves, too, on the same thread
            assert encryption.travel()["key"] == KEY.hex()
        return KEY

    encryption = AESGCM(provider, key_id="mine")
    assert encryption.travel()["key"] == KEY.hex()


def test_an_unknown_name_says_what_would_provide_it() -> None:
    with pytest.raises(UnsupportedFormat, match=r"by os.system@evil/1, .*entry point 'os.system@evil'.*registry="):
        ExtensionRegistry().from_descriptor("os.system@evil/1")
    with pytest.raises(UnsupportedFormat, match=r"by stream.zstd/2, which is not readable here: version '2'"):
        ExtensionRegistry().from_descriptor("stream.zstd/2")
    with pytest.raises(UnsupportedFormat, match="is not the descriptor"):
        ExtensionRegistry().from_descriptor("a b")


def test_registered_classes_and_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    known = ExtensionRegistry()
    known.register(Xor)
    found = known.with_instances([ZStandard()]).from_descriptor("xor@tests/07")
    assert isinstance(found, Xor) and found.key == 7
    with pytest.raises(InvalidOption, match="register takes a subclass"):
        known.register(int)  # type: ignore[arg-type]
    points = EntryPoints([EntryPoint("stream.zlib@tests", "tests.extensions.samples:Zlib", registry.ENTRY_POINTS)])
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **wanted: points.select(**wanted))
    assert isinstance(ExtensionRegistry().from_descriptor("stream.zlib@tests/1"), Zlib)
    points = EntryPoints([EntryPoint("broken@tests", "tests.extensions.nowhere:It", registry.ENTRY_POINTS)])
    with pytest.raises(UnsupportedFormat, match=r"broken@tests could not be loaded .*nowhere:It: ModuleNotFoundError"):
        ExtensionRegistry().from_descriptor("broken@tests/1")


def test_an_order_that_saves_nothing_warns() -> None:
    with pytest.warns(ExtensionOrderWarning, match=r"stream.zstd comes after encrypt.aesgcm.*put the encryption last"):
        AsyncCheckpointer(extensions=[AESGCM(KEY), ZStandard()], process=False).close()
    with pytest.warns(ExtensionOrderWarning, match="stream.zstd comes after encrypt.aesgcm"):
        Chain([AESGCM(KEY), Xor(), ZStandard()]).warn_of_order()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AsyncCheckpointer(extensions=[BytePlanes(), ZStandard(), AESGCM(KEY)], process=False).close()
        Chain([AESGCM(KEY), Xor()]).warn_of_order()  # such as a code that corrects errors


def test_what_is_no_registry() -> None:
    kinds: list[Any] = [AsyncCheckpointer, SyncCheckpointer, partial(CheckpointManager, "run")]
    for made in kinds:
        with pytest.raises(InvalidOption, match="registry takes an ExtensionRegistry, not"):
            made(registry=[Xor()], process=False)
        with pytest.raises(InvalidOption, match="extensions takes a sequence"):
            made(extensions=Xor(), process=False)
    with pytest.raises(InvalidOption, match="ExtensionRegistry takes instances of extensions, not <class"):
        ExtensionRegistry([Xor])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        (KeyError("5a"), UnsupportedFormat, "by xor@tests/5a, which is not readable here: KeyError: '5a'"),
        (ValueError("too new"), UnsupportedFormat, "by xor@tests/5a, which is not readable here: too new"),
        (None, InvalidOption, r"Odd.from_descriptor\('5a'\) returned no Extension, but None"),
    ],
)
def test_a_class_that_makes_nothing_names_the_descriptor(answer: Any, error: type[Exception], says: str) -> None:
    class Odd(Xor):
        @staticmethod
        def from_descriptor(version: str) -> Any:
            if answer is not None:
                raise answer

    known = ExtensionRegistry()
    known.register(Odd)
    with pytest.raises(error, match=says):
        known.from_descriptor("xor@tests/5a")


def test_what_is_no_extension() -> None:
    with pytest.raises(InvalidOption, match="extensions takes instances"):
        Chain(["zstd"])  # type: ignore[list-item]
    with pytest.raises(InvalidOption, match="extensions takes a sequence"):
        Chain(BytePlanes())  # type: ignore[arg-type]


def test_what_an_extension_does_wrong_names_it() -> None:
    class Empty(Xor):
        def encode(self, data: Any, context: Any) -> bytes:
            return b""

    class Failing(Xor):
        def encode(self, data: Any, context: Any) -> bytes:
            raise error

        decode = encode

    with pytest.raises(AsyncDCPError, match=r"xor@tests/5a failed at block 2 of .*: it made 0 bytes"):
        Chain([Empty()]).encode(memoryview(b"abc"), context(2))
    for error in (KeyError("x"), SystemExit(1), asyncio.CancelledError()):
        with pytest.raises(AsyncDCPError, match=rf"failed at block 2 .*{type(error).__name__}"):
            Chain([Failing()]).encode(memoryview(b"abc"), context(2))
        with pytest.raises(CorruptCheckpoint, match=rf"block 2 cannot be decoded .*{type(error).__name__}"):
            Chain([Failing()]).decode(memoryview(b"abc"), context(2), 3)


def test_what_cannot_travel() -> None:
    class Local(Xor):
        pass

    assert spec_of(Local()) is None
    assert spec_of(Xor(travels=False)) is None
    assert spec_of(Zlib()) is None
    assert Chain([ZStandard(), Zlib()]).specs is None
    spec = spec_of(AESGCM(KEY))
    assert spec is not None and KEY.hex() not in repr(spec)


# ── keys ──


def test_a_key_has_the_right_length_and_is_never_shown() -> None:
    for wrong in (b"short", "a" * 32, None):
        with pytest.raises(InvalidOption) as caught:
            AESGCM(wrong)  # type: ignore[arg-type]
        assert "short" not in str(caught.value)
    with pytest.raises(InvalidOption, match="key_id"):
        AESGCM(lambda _: KEY)
    with pytest.raises(InvalidOption, match="key_id takes"):
        AESGCM(KEY, key_id="a b")
    assert KEY.hex() not in repr(AESGCM(KEY)) + AESGCM(KEY).get_descriptor()


@pytest.mark.parametrize("text", [KEY.hex(), base64.b64encode(KEY).decode(), base64.urlsafe_b64encode(KEY).decode()])
def test_keys_in_the_environment(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    descriptor = AESGCM(KEY).get_descriptor()
    monkeypatch.delenv("ASYNCDCP_KEY", raising=False)
    with pytest.raises(
        KeyUnavailable, match=f"the key '{key_name(KEY)}', and the environment variable ASYNCDCP_KEY is not"
    ):
        ExtensionRegistry().from_descriptor(descriptor)
    monkeypatch.setenv("ASYNCDCP_KEY", f"{OTHER.hex()},{text}")
    found = ExtensionRegistry().from_descriptor(descriptor)
    kept = AESGCM(KEY).encode(memoryview(b"abc"), context())
    assert isinstance(found, AESGCM) and found.decode(memoryview(kept), context()) == b"abc"
    assert AESGCM.from_environment().get_descriptor() == AESGCM(OTHER).get_descriptor()
    monkeypatch.setenv("ASYNCDCP_KEY", "rubbish")
    with pytest.raises(InvalidOption, match="ASYNCDCP_KEY takes a key of 32 bytes"):
        ExtensionRegistry().from_descriptor(descriptor)


def test_keys_by_a_callable_and_rotation() -> None:
    keys = {"2025": OTHER, "2026": KEY}
    old = AESGCM(keys.__getitem__, key_id="2025")
    new = AESGCM(keys.__getitem__, key_id="2026")
    kept = old.encode(memoryview(b"abc"), context())
    found = ExtensionRegistry([new]).from_descriptor(old.get_descriptor())
    assert isinstance(found, AESGCM) and found.decode(memoryview(kept), context()) == b"abc"
    with pytest.raises(KeyUnavailable, match="'2024'"):
        ExtensionRegistry([new]).from_descriptor("encrypt.aesgcm/1.2024")
    both = ExtensionRegistry([AESGCM(KEY), AESGCM(OTHER)])
    assert both.from_descriptor(AESGCM(OTHER).get_descriptor()).get_descriptor() == AESGCM(OTHER).get_descriptor()


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        (ConnectionError("token 12345"), KeyUnavailable, "the key 'mine' could not be had: its provider raised Conn"),
        (KeyError("mine"), KeyUnavailable, "there is no key 'mine'"),
        (b"short", InvalidOption, "a key takes 32 random bytes"),
    ],
)
def test_a_provider_that_fails_is_no_damage(answer: Any, error: type[Exception], says: str) -> None:
    def provider(key_id: str) -> bytes:
        if isinstance(answer, Exception):
            raise answer
        return bytes(answer)

    stored = AESGCM(KEY, key_id="mine").encode(memoryview(b"abc"), context())
    failing = AESGCM(provider, key_id="mine")
    with pytest.raises(error, match=says) as caught:
        Chain([failing]).decode(memoryview(stored), context(), 3)
    assert "12345" not in str(caught.value)
    for hidden in (True, False):
        token, body = AESGCM(KEY, key_id="mine", hide_metadata=hidden).seal(b"{}", "s" * 20, "s" * 20)
        seal = Seal(failing.get_descriptor(), token.hex(), hidden)
        seals = Seals(ExtensionRegistry([failing]))
        if hidden or error is InvalidOption:
            with pytest.raises(error, match=says):
                seals(seal, body or b"{}", "s" * 20)
        else:
            assert seals(seal, b"{}", "s" * 20) == b"{}" and "s" * 20 not in seals


@pytest.mark.parametrize("version", ["1.", f"1.{'x' * 65}", "2.abc"])
def test_a_key_id_that_cannot_be_is_the_checkpoints_fault(version: str) -> None:
    with pytest.raises(UnsupportedFormat):
        ExtensionRegistry([AESGCM(KEY)]).from_descriptor(f"encrypt.aesgcm/{version}")


def test_a_block_is_bound_to_its_place() -> None:
    cipher, home = AESGCM(KEY), context(1)
    kept = memoryview(bytes(cipher.encode(memoryview(b"abc"), home)))
    assert cipher.decode(kept, home) == b"abc"
    elsewhere = [
        home._replace(block=2),
        home._replace(blocks=5),
        home._replace(file="0123456789abcdef0123-1-0.bin"),
        home._replace(save_id="f" * 20),
    ]
    for place in elsewhere:
        with pytest.raises(ValueError, match="it was changed, or moved here from elsewhere"):
            cipher.decode(kept, place)
    assert bytes(cipher.encode(memoryview(b"abc"), home)) != bytes(kept), "a nonce was used twice"
