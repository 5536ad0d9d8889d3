"""Extensions of a user's own, at the top of a module that can be imported anywhere."""

from __future__ import annotations

import io
import os
import zlib
from typing import IO, Any, cast

from asyncdcp import BlockContext, BlockExtension, StreamTransformExtension

PID_FILE = "ASYNCDCP_TEST_PID_FILE"


class Xor(BlockExtension):
    """Every byte xor ``key``; notes in which process it works, where the environment asks for that."""

    def __init__(self, key: int = 0x5A, *, travels: bool = True) -> None:
        self.key = key
        self._travels = travels

    @staticmethod
    def registry_name() -> str:
        return "xor@tests"

    @staticmethod
    def from_descriptor(version: str) -> Xor:
        return Xor(int(version, 16)) if len(version) == 2 else _unknown(version)

    def get_descriptor(self) -> str:
        return f"xor@tests/{self.key:02x}"

    def travel(self) -> dict[str, Any] | None:
        return {"key": self.key} if self._travels else None

    def encode(self, data: memoryview, context: BlockContext) -> bytes:
        if path := os.environ.get(PID_FILE):
            with open(path, "a") as file:
                file.write(f"{os.getpid()}\n")
        return bytes(data).translate(bytes(byte ^ self.key for byte in range(256)))

    def decode(self, data: memoryview, context: BlockContext) -> bytes:
        return bytes(data).translate(bytes(byte ^ self.key for byte in range(256)))


class Unmakeable(Xor):
    """Travels as far as the background process, and no further."""

    @classmethod
    def arrive(cls, arguments: Any) -> Any:
        raise RuntimeError("not here")


class Zlib(StreamTransformExtension):
    """As an extension for DCP is written: streams around streams, which end when they are closed."""

    role = "compression"

    @staticmethod
    def registry_name() -> str:
        return "stream.zlib@tests"

    @staticmethod
    def from_descriptor(version: str) -> Zlib:
        return Zlib() if version == "1" else _unknown(version)

    def get_descriptor(self) -> str:
        return "stream.zlib@tests/1"

    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        return cast("IO[bytes]", _Deflating(output))

    def transform_from(self, input: IO[bytes]) -> IO[bytes]:
        return cast("IO[bytes]", io.BufferedReader(_Inflating(input)))


class _Deflating(io.RawIOBase):
    def __init__(self, output: IO[bytes]) -> None:
        self._output = output
        self._deflate = zlib.compressobj(1)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._output.write(self._deflate.compress(data[:60_000]))  # a part of it: streams may
        return len(data[:60_000])

    def close(self) -> None:
        if not self.closed:
            self._output.write(self._deflate.flush())
            self._output.close()
        super().close()


class _Inflating(io.RawIOBase):
    def __init__(self, input: IO[bytes]) -> None:
        self._input = input
        self._inflate = zlib.decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._inflate.eof:
            data = self._inflate.unconsumed_tail or self._input.read(1000)
            part = self._inflate.decompress(data, len(buffer))
            if part:
                buffer[: len(part)] = part
                return len(part)
            if not data:
                raise ValueError("the stream is cut short")
        return 0


def _unknown(version: str) -> Any:
    raise ValueError(f"version {version!r} is not known")
