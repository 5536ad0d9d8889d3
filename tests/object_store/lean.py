"""A server of our own that keeps objects in memory, and speaks as much of S3's language as a client of it needs.

A thread for each connection, bodies received straight into the memory that they stay in, no checksums: it costs as
little as Python lets it, so that what a client costs can be seen beside it. Google's language is the same but for some
headers; Azure's is in ``azure.py``. Signatures are not looked at.
"""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar, Final
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

_KEY: Final = re.compile(rb"<Key>(.*?)</Key>")
_PART: Final = re.compile(rb"<PartNumber>(\d+)</PartNumber>")


@dataclass(frozen=True)
class Stored:
    """An object, in the parts that it came in."""

    parts: tuple[memoryview, ...]
    tag: str
    metadata: Mapping[str, str]
    modified: float = field(default_factory=time.time)

    @property
    def size(self) -> int:
        return sum(map(len, self.parts))

    def pieces(self, begin: int, end: int) -> Iterator[memoryview]:
        at = 0
        for part in self.parts:
            piece = part[max(0, begin - at) : max(0, end - at)]
            at += len(part)
            if piece:
                yield piece


@dataclass
class Memory:
    """What a server holds, by bucket and key; ``begun`` are parts, by upload and number. ``seen`` are all requests."""

    objects: dict[str, Stored] = field(default_factory=dict)
    begun: dict[str, tuple[str, dict[int, memoryview], Mapping[str, str]]] = field(default_factory=dict)
    seen: list[tuple[str, str, Mapping[str, str]]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def store(self, name: str, parts: tuple[memoryview, ...], metadata: Mapping[str, str], *, new: bool) -> str | None:
        """The tag; None if there is such an object, and it was to be a ``new`` one."""
        with self.lock:
            if new and name in self.objects:
                return None
            made = self.objects[name] = Stored(parts, f'"{next(self.numbers):032x}"', metadata)
            return made.tag

    def remove(self, name: str) -> Stored | None:
        """What was there. Not while the names are gone through."""
        with self.lock:
            return self.objects.pop(name, None)

    def listed(self, prefix: str, delimiter: str) -> tuple[list[tuple[str, Stored]], list[str]]:
        """The objects, and what they have in common up to the delimiter."""
        found, common = list[tuple[str, Stored]](), set[str]()
        with self.lock:
            names = sorted(name for name in self.objects if name.startswith(prefix))
            for name in names:
                head, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
                if cut:
                    common.add(f"{prefix}{head}{cut}")
                else:
                    found.append((name, self.objects[name]))
        return found, sorted(common)


class S3Handler(BaseHTTPRequestHandler):
    """``/bucket/key``, and Google's headers beside Amazon's."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    memory: ClassVar[Memory]
    exists: ClassVar[tuple[int, str]] = (412, "PreconditionFailed")

    def log_message(self, *_: object) -> None:
        pass

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
        self.name = unquote(parts.path).strip("/")
        self.memory.seen.append((self.command, self.path, {key.lower(): value for key, value in self.headers.items()}))
        self.answer_request(self._body())

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle  # as http.server has them

    def answer_request(self, body: memoryview) -> None:
        """Of S3."""
        answers: dict[str, Callable[[memoryview], None]] = {
            "PUT": self._put,
            "POST": self._post,
            "DELETE": self._delete,
            "GET": self._get,
            "HEAD": self._get,
        }
        answers[self.command](body)

    def _body(self) -> memoryview:
        body = memoryview(bytearray(int(self.headers.get("content-length") or 0)))
        left = body
        while left and (got := self.rfile.readinto(left)):
            left = left[got:]
        if "aws-chunked" in self.headers.get("content-encoding", ""):
            return _unchunked(body)
        return body

    def answer(self, status: int, *pieces: bytes | memoryview, length: int | None = None, **headers: str) -> None:
        """``pieces`` are the body."""
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(sum(map(len, pieces)) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            for piece in pieces:
                self.connection.sendall(piece)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode())

    def metadata(self, *prefixes: str) -> dict[str, str]:
        return {name: value for name, value in self.headers.items() if name.lower().startswith(prefixes)}

    def send_object(self) -> None:
        """The object, or the part of it that is asked for."""
        found = self.memory.objects.get(self.name)
        if found is None:
            return self.refuse(404, "NoSuchKey")
        if self.headers.get("if-match", found.tag) != found.tag:
            return self.refuse(412, "PreconditionFailed")
        begin, end, headers = 0, found.size, dict(found.metadata)
        headers |= {"ETag": found.tag, "Last-Modified": formatdate(found.modified, usegmt=True)}
        asked = self.headers.get("range")
        if asked is not None:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin, end = int(first or 0), min(int(last or end) + 1, end)
            if begin >= end:
                return self.refuse(416, "InvalidRange")
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{found.size}"
        pieces = found.pieces(begin, end) if self.command == "GET" else ()
        return self.answer(200 if asked is None else 206, *pieces, length=end - begin, **headers)

    # ── S3 ──

    def _put(self, body: memoryview) -> None:
        if "uploadId" in self.query:
            begun = self.memory.begun.get(self.query["uploadId"])
            if begun is None:
                return self.refuse(404, "NoSuchUpload")
            begun[1][int(self.query["partNumber"])] = body
            return self.answer(200, ETag=f'"{self.query["partNumber"]:0>32}"')
        if "/" not in self.name:
            return self.answer(200)  # a bucket
        new = self.headers.get("if-none-match") == "*" or self.headers.get("x-goog-if-generation-match") == "0"
        parts, copied = (body,), self.headers.get("x-amz-copy-source")
        if copied is not None:
            parts = self.memory.objects[unquote(copied).strip("/")].parts  # type: ignore[assignment]
        tag = self.memory.store(self.name, parts, self.metadata("x-amz-meta-", "x-goog-meta-"), new=new)
        if tag is None:
            return self.refuse(*self.exists)
        if copied is not None:
            return self._answer_xml("CopyObjectResult", ETag=tag, LastModified=_iso(time.time()))
        return self.answer(200, ETag=tag)

    def _post(self, body: memoryview) -> None:
        bucket, _, key = self.name.partition("/")
        if "uploads" in self.query:
            upload = f"{next(self.memory.numbers):032x}"
            self.memory.begun[upload] = (self.name, {}, self.metadata("x-amz-meta-", "x-goog-meta-"))
            return self._answer_xml("InitiateMultipartUploadResult", Bucket=bucket, Key=key, UploadId=upload)
        if "delete" in self.query:
            for found in _KEY.findall(bytes(body)):
                self.memory.remove(f"{bucket}/{unescape(found.decode())}")
            return self._answer_xml("DeleteResult")
        begun = self.memory.begun.pop(self.query.get("uploadId", ""), None)
        if begun is None:
            return self.refuse(404, "NoSuchUpload")
        parts = tuple(begun[1][int(number)] for number in _PART.findall(bytes(body)))
        tag = self.memory.store(self.name, parts, begun[2], new=False)
        return self._answer_xml("CompleteMultipartUploadResult", Bucket=bucket, Key=key, ETag=tag or "")

    def _delete(self, body: memoryview) -> None:
        if "uploadId" in self.query:
            self.memory.begun.pop(self.query["uploadId"], None)
        else:
            self.memory.remove(self.name)
        self.answer(204)

    def _get(self, body: memoryview) -> None:
        if "/" in self.name:
            return self.send_object()
        if "uploads" in self.query:
            return self._list_uploads()
        if "location" in self.query:
            return self._answer_xml("LocationConstraint")
        found, common = self.memory.listed(
            f"{self.name}/{self.query.get('prefix', '')}", self.query.get("delimiter", "")
        )
        start = len(self.name) + 1
        rows = [
            xml("Contents", Key=name[start:], LastModified=_iso(each.modified), ETag=each.tag, Size=str(each.size))
            for name, each in found
        ]
        rows += [xml("CommonPrefixes", Prefix=each[start:]) for each in common]
        counts = {"KeyCount": str(len(rows)), "MaxKeys": "1000", "IsTruncated": "false"}
        return self._answer_xml("ListBucketResult", *rows, Name=self.name, **counts)

    def _list_uploads(self) -> None:
        prefix = f"{self.name}/{self.query.get('prefix', '')}"
        rows = [
            xml("Upload", Key=name[len(self.name) + 1 :], UploadId=upload, Initiated=_iso(time.time()))
            for upload, (name, *_) in list(self.memory.begun.items())
            if name.startswith(prefix)
        ]
        self._answer_xml("ListMultipartUploadsResult", *rows, Bucket=self.name, IsTruncated="false")

    def _answer_xml(self, element: str, *rows: str, **fields: str) -> None:
        self.answer(200, xml(element, *rows, **fields).encode(), Content_Type="application/xml")


def xml(element: str, *rows: str, **fields: str) -> str:
    inner = "".join(f"<{name}>{escape(value)}</{name}>" for name, value in fields.items())
    return f"<{element}>{inner}{''.join(rows)}</{element}>"


def _iso(when: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(when))


def _unchunked(body: memoryview) -> memoryview:
    """Without the frames of aws-chunked; what follows the last chunk are checksums."""
    data, at = memoryview(bytearray(len(body))), 0
    made = 0
    while True:
        line = bytes(body[at : at + 200]).split(b"\r\n", 1)[0]
        size = int(line.split(b";")[0], 16)
        at += len(line) + 2
        if not size:
            return data[:made]
        data[made : made + size] = body[at : at + size]
        made, at = made + size, at + size + 2


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


def new_server(handler: type[S3Handler]) -> tuple[ThreadingHTTPServer, Memory]:
    """Not started yet."""
    memory = Memory()
    return _Server(("127.0.0.1", 0), type(handler.__name__, (handler,), {"memory": memory})), memory


@contextmanager
def running(handler: type[S3Handler]) -> Iterator[tuple[str, Memory]]:
    """A server on threads of this process: its URL, and what it holds."""
    server, memory = new_server(handler)
    server.block_on_close = False  # clients keep their connections
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", memory
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
