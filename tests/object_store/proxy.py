"""A proxy between a client and a server of HTTP/1.1 that does what networks and busy stores do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

_REASONS = {"500": "InternalError", "503": "SlowDown", "409": "ConditionalRequestConflict", "403": "AccessDenied"}
_REASONS |= {"301": "PermanentRedirect", "404": "NoSuchBucket"}


@dataclass
class Request:
    """As the proxy sees it. ``fault`` is what was done to it."""

    method: str
    target: str
    headers: dict[str, str]
    length: int
    fault: str = ""

    @property
    def is_part(self) -> bool:
        return "partNumber=" in self.target

    @property
    def is_claim(self) -> bool:
        return self.headers.get("if-none-match") == "*"


Choose = Callable[[Request], str]
"""What happens to a request:

"" nothing; a status (one of ``_REASONS``): that answer, and the server never hears of it; "reset": the same without an
answer; "stall": the same for ever; "truncate": half of the answer's body. With "after " before it: the server carries
the request out, and then.
"""


@dataclass
class Proxy:
    """``url`` leads to the server by way of the proxy; ``seen`` are all requests so far."""

    upstream: str
    choose: Choose = lambda request: ""
    seen: list[Request] = field(default_factory=list)
    url: str = ""
    stalls: int = 0
    stalls_wanted: int = 1
    stalled: asyncio.Event = field(default_factory=asyncio.Event)
    release: asyncio.Event = field(default_factory=asyncio.Event)

    def count(self, method: str, fault: str = "") -> int:
        return sum(request.method == method and request.fault == fault for request in self.seen)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of the client's."""
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                while await self._exchange(reader, writer):
                    pass
        except asyncio.CancelledError:  # at the end, when nobody waits until all is sent
            writer.transport.abort()
            raise
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer; whether another may follow on the connection."""
        head = await reader.readuntil(b"\r\n\r\n")
        request = _parsed(head)
        self.seen.append(request)
        request.fault = self.choose(request)
        if request.fault in ("stall", "reset"):
            return await self._answer(writer, request.fault, b"")
        body = await reader.readexactly(request.length)
        after = request.fault.startswith("after ")
        fault = request.fault.removeprefix("after ")
        answer = await self._ask(head, body) if after or fault in ("", "truncate") else b""
        return await self._answer(writer, fault, answer)

    async def _answer(self, writer: asyncio.StreamWriter, fault: str, answer: bytes) -> bool:
        if fault == "stall":
            self.stalls += 1
            if self.stalls >= self.stalls_wanted:
                self.stalled.set()
            await self.release.wait()
            return False
        if fault == "reset":
            writer.transport.abort()
            return False
        if fault in _REASONS:
            body = f"<Error><Code>{_REASONS[fault]}</Code><Message>As told</Message></Error>".encode()
            head = f"HTTP/1.1 {fault} Told\r\nConnection: close\r\nContent-Length: {len(body)}"
            answer = f"{head}\r\n\r\n".encode() + body
        if fault == "truncate":
            start = answer.index(b"\r\n\r\n") + 4
            answer = answer[: start + (len(answer) - start) // 2]
        writer.write(answer)
        await writer.drain()
        return False

    async def _ask(self, head: bytes, body: bytes) -> bytes:
        parts = urlsplit(self.upstream)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            writer.write(head[:-2] + b"Connection: close\r\n\r\n" + body)
            return await reader.read()
        finally:
            writer.transport.abort()  # all was read; or else nobody waits for it, nor until all is sent


def _parsed(head: bytes) -> Request:
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    return Request(method, target, headers, int(headers.get("content-length", "0")))


@asynccontextmanager
async def proxied(upstream: str) -> AsyncIterator[Proxy]:
    """A proxy that does nothing yet."""
    proxy = Proxy(upstream)
    connections: set[asyncio.Task[None]] = set()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(proxy.serve(reader, writer))
        connections.add(task)
        task.add_done_callback(connections.discard)

    server = await asyncio.start_server(connected, "127.0.0.1", 0, limit=1 << 20)
    proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()
        proxy.release.set()
        for task in list(connections):
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
