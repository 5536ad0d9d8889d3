"""Compressed and encrypted checkpoints by the public verbs."""

from __future__ import annotations

import io
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import zstandard

from asyncdcp import (
    AESGCM,
    AsyncCheckpointer,
    BlockContext,
    BytePlanes,
    ExtensionRegistry,
    MemoryStorage,
    Progress,
    SyncCheckpointer,
    ZStandard,
)
from asyncdcp.errors import AsyncDCPError, KeyUnavailable, UnsupportedFormat
from tests.extensions.samples import Xor

KEY = bytes(range(32))
STATE: dict[str, Any] = {
    "w": torch.randn(700_000) * 0.02,
    "b": torch.randn(9_000).bfloat16(),
    "zeros": torch.zeros(9_999),
}


def test_a_compressed_file_is_a_compressed_safetensors(tmp_path: Path) -> None:
    with SyncCheckpointer(process=False, extensions=[ZStandard()]) as checkpointer:
        result = checkpointer.save(tmp_path, STATE)
    (file,) = tmp_path.glob("*.safetensors.zst")
    assert result.stored_bytes == file.stat().st_size < 0.95 * result.tensor_bytes
    stream = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(file.read_bytes()), read_across_frames=True)
    by_library = safetensors.torch.load(stream.read())
    assert all(torch.equal(by_library[name], tensor) for name, tensor in STATE.items())
    if shutil.which("zstd"):
        subprocess.run(["zstd", "-q", "-d", str(file)], check=True)
        by_program = safetensors.torch.load_file(file.with_suffix(""))
        assert all(torch.equal(by_program[name], tensor) for name, tensor in STATE.items())
    with SyncCheckpointer(process=False) as other:  # which was given no extension
        loaded = other.load(tmp_path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in STATE.items())


async def test_encrypted_loaded_in_place_and_verified_without_the_key(tmp_path: Path) -> None:
    steps: list[Progress] = []
    async with AsyncCheckpointer(process=False, extensions=[BytePlanes(), ZStandard(), AESGCM(KEY)]) as checkpointer:
        await checkpointer.save(tmp_path, STATE, on_progress=steps.append)
        target = {name: torch.empty_like(tensor).t() for name, tensor in STATE.items()}
        await checkpointer.load(tmp_path, target)
        assert all(torch.equal(target[name], tensor) for name, tensor in STATE.items())
        assert (await checkpointer.verify(tmp_path)).ok
    written = [step for step in steps if step.stage == "write"]
    assert written and written[-1].done == written[-1].total
    async with AsyncCheckpointer(process=False) as stranger:
        assert (await stranger.verify(tmp_path)).ok
        with pytest.raises(KeyUnavailable, match=r"extensions=\[AESGCM\(key\)\]"):
            await stranger.load(tmp_path)
        with pytest.raises(KeyUnavailable):
            await stranger.load(tmp_path, target)


async def test_a_users_extension_is_found_by_its_instance_or_by_the_registry(tmp_path: Path) -> None:
    async with AsyncCheckpointer(process=False, extensions=[Xor()]) as checkpointer:
        await checkpointer.save(tmp_path, STATE)
        assert torch.equal((await checkpointer.load(tmp_path))["w"], STATE["w"])
    known = ExtensionRegistry()
    known.register(Xor)
    async with AsyncCheckpointer(process=False, registry=known) as checkpointer:
        assert torch.equal((await checkpointer.load(tmp_path))["w"], STATE["w"])
    async with AsyncCheckpointer(process=False) as checkpointer:
        with pytest.raises(UnsupportedFormat, match=r"was transformed by xor@tests/5a, which is not known here"):
            await checkpointer.load(tmp_path)


class Thrifty(Xor):
    """Encodes every block into the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self._memory = bytearray(1 << 20)

    def encode(self, data: memoryview, context: BlockContext) -> memoryview:  # type: ignore[override]  # as blocks may be
        self._memory[: len(data)] = super().encode(data, context)
        return memoryview(self._memory)[: len(data)]


def test_one_memory_for_several_blocks_is_refused() -> None:
    checkpointer = SyncCheckpointer(process=False, extensions=[Thrifty()])
    with checkpointer, pytest.raises(AsyncDCPError, match="xor@tests/5a returned the same memory for two blocks"):
        checkpointer.save(MemoryStorage(), STATE)
