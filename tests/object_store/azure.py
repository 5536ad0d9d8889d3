"""As much of Azure's language as a client of ours needs: ``/account/container/blob``, lists of blocks, batches."""

from __future__ import annotations

import base64
import re
from email.utils import formatdate
from typing import Final
from urllib.parse import unquote, urlsplit

from tests.object_store.lean import S3Handler, xml

_BLOCK: Final = re.compile(rb"<(?:Uncommitted|Latest)>(.*?)</(?:Uncommitted|Latest)>")
_IDENTIFIER: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_DELETE: Final = re.compile(r"Content-ID: (\d+).*?DELETE (\S+) HTTP/1\.1", re.DOTALL)


class AzureHandler(S3Handler):
    """Blocks that no list has taken stay in ``Memory.begun`` under the blob's name, as Azure keeps them for a week."""

    def answer_request(self, body: memoryview) -> None:
        account, _, self.name = self.name.partition("/")
        comp = self.query.get("comp", "")
        if comp == "batch":
            self._delete_all(account, bytes(body).decode())
        elif comp == "list":
            self._list_blobs()
        elif self.command == "PUT":
            self._put_blob(comp, body)
        elif self.command == "DELETE":
            found = self.memory.remove(self.name)
            self.answer(404 if found is None else 202)
        else:
            self.send_object()

    def _put_blob(self, comp: str, body: memoryview) -> None:
        if self.query.get("restype") == "container":
            return self.answer(201)
        metadata = self.metadata("x-ms-meta-")
        if not all(_IDENTIFIER.fullmatch(name[len("x-ms-meta-") :]) for name in metadata):
            return self.refuse(400, "InvalidMetadata")
        if comp == "block":
            number = int(base64.b64decode(self.query["blockid"]), 16)
            self.memory.begun.setdefault(self.name, (self.name, {}, metadata))[1][number] = body
            return self.answer(201)
        parts: tuple[memoryview, ...] = (body,)
        if comp == "blocklist":
            blocks = self.memory.begun.pop(self.name, ("", {}, {}))[1]
            try:
                parts = tuple(blocks[int(base64.b64decode(block), 16)] for block in _BLOCK.findall(bytes(body)))
            except KeyError:
                return self.refuse(400, "InvalidBlockList")
        tag = self.memory.store(self.name, parts, metadata, new=self.headers.get("if-none-match") == "*")
        if tag is None:
            return self.refuse(409, "BlobAlreadyExists")
        return self.answer(201, ETag=tag)

    def _list_blobs(self) -> None:
        prefix = f"{self.name}/{self.query.get('prefix', '')}"
        found, common = self.memory.listed(prefix, self.query.get("delimiter", ""))
        start = len(self.name) + 1
        rows = []
        for name, each in found:
            about = {"Last-Modified": formatdate(each.modified, usegmt=True), "Content-Length": str(each.size)}
            properties = xml("Properties", **about, Etag=each.tag, **{"Content-Type": "application/octet-stream"})
            rows.append(xml("Blob", properties, Name=name[start:]))
        rows += [xml("BlobPrefix", Name=prefix[start:]) for prefix in common]
        self.answer(200, xml("EnumerationResults", xml("Blobs", *rows), NextMarker="").encode())

    def _delete_all(self, account: str, batch: str) -> None:
        answers = []
        for number, target in _DELETE.findall(batch):
            name = unquote(urlsplit(target).path).strip("/").removeprefix(f"{account}/")
            gone = self.memory.remove(name) is None
            status = "404 The specified blob does not exist." if gone else "202 Accepted"
            head = f"Content-Type: application/http\r\nContent-ID: {number}"
            answers.append(f"--b\r\n{head}\r\n\r\nHTTP/1.1 {status}\r\n\r\n")
        self.answer(202, f"{''.join(answers)}--b--\r\n".encode(), Content_Type="multipart/mixed; boundary=b")
