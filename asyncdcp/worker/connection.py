"""One end of the socket pair, on an asyncio loop: frames out without waiting, messages in by callback."""

from __future__ import annotations

import array
import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

from asyncdcp.worker.protocol import Framer, ProtocolError, ToTrainer, ToWorker, encode

_CHUNK: Final = 256 << 10
_ROUNDS: Final = 16
_ANCILLARY: Final = socket.CMSG_SPACE(16 * array.array("i").itemsize)

T = TypeVar("T")


class Connection(Generic[T]):
    """Owns ``sock``. Made and used on one loop.

    ``post`` never waits: what the kernel does not take is kept here, and the protocol bounds that (slots of the arena,
    one job and one answer a save). ``on_message`` is called for each message in order. ``on_end`` is called once, when
    the other side has closed, with None, or with the error that ended the talk; not after ``close``.
    """

    def __init__(
        self,
        sock: socket.socket,
        incoming: Any,
        on_message: Callable[[T], object],
        on_end: Callable[[Exception | None], object],
    ) -> None:
        sock.settimeout(0)
        self._sock = sock
        self._framer: Framer[T] = Framer(incoming)
        self._on_message = on_message
        self._on_end = on_end
        self._out: deque[tuple[memoryview, int | None]] = deque()
        self._fds: deque[int] = deque()
        self._flushed = asyncio.Event()
        self._flushed.set()
        self._broken = False
        self._ended = False
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock.fileno(), self._readable)

    # ── out ──

    def post(self, message: ToWorker | ToTrainer, fd: int | None = None) -> None:
        """Sends a message, with a duplicate of ``fd``. On a connection that has ended it is dropped."""
        if self._broken:
            return
        self._out.append((memoryview(encode(message)), None if fd is None else os.dup(fd)))
        if len(self._out) == 1:
            self._flush()

    async def flushed(self) -> None:
        """Returns when the kernel holds everything posted so far, or the connection has ended."""
        await self._flushed.wait()

    def _flush(self) -> None:
        try:
            while self._out:
                view, fd = self._out[0]
                sent = self._send(view, fd)
                if fd is not None:
                    os.close(fd)
                if sent < len(view):
                    self._out[0] = (view[sent:], None)
                else:
                    self._out.popleft()
        except (BlockingIOError, InterruptedError):
            if self._flushed.is_set():
                self._flushed.clear()
                self._loop.add_writer(self._sock.fileno(), self._flush)
        except OSError:  # the other side is gone; the reader, or its pidfd, says so
            self._break()
        else:
            self._all_sent()

    def _send(self, view: memoryview, fd: int | None) -> int:
        if fd is None:
            return self._sock.send(view, socket.MSG_NOSIGNAL)
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", (fd,)))
        return self._sock.sendmsg([view], [rights], socket.MSG_NOSIGNAL)  # socket.send_fds drops the flags

    def _all_sent(self) -> None:
        if not self._flushed.is_set():
            self._loop.remove_writer(self._sock.fileno())
            self._flushed.set()

    def _break(self) -> None:
        self._broken = True
        for _, fd in self._out:
            if fd is not None:
                os.close(fd)
        self._out.clear()
        self._all_sent()

    # ── in ──

    def take_fd(self) -> int:
        """The descriptor that came with the message being handled; the caller's from then on."""
        if not self._fds:
            raise ProtocolError("a message came without its descriptor")
        return self._fds.popleft()

    def read_all(self) -> None:
        """Handles everything that has arrived."""
        while not self._ended and self._read():
            pass

    def _readable(self) -> None:
        for _ in range(_ROUNDS):  # then others on the loop have a turn
            if self._ended or not self._read():
                return

    def _read(self) -> bool:
        """Handles some messages; False if nothing (more) is there."""
        try:
            data, rights, _, _ = self._sock.recvmsg(_CHUNK, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            data, rights = b"", []
        for _, _, fds in rights:
            self._fds.extend(array.array("i", fds))
        if not data:
            self._end(None)
            return False
        try:
            for message in self._framer.feed(data):
                self._on_message(message)
        except Exception as error:  # noqa: BLE001  # whatever it is, there is no talking any more
            self._end(error)
            return False
        return True

    def _end(self, error: Exception | None) -> None:
        if not self._ended:
            self._ended = True
            self._loop.remove_reader(self._sock.fileno())
            if error is None:
                self._break()
            self._on_end(error)

    # ── the end ──

    def close_inherited(self) -> None:
        """In a forked child: closes the descriptor alone. The loop's epoll is the parent's, too."""
        self._ended = self._broken = True
        self._sock.close()

    def close(self) -> None:
        """Closes the socket; safe to call twice."""
        if self._sock.fileno() >= 0:
            self._ended = True
            self._loop.remove_reader(self._sock.fileno())
            self._break()
            self._loop.remove_writer(self._sock.fileno())
            self._sock.close()
        while self._fds:
            os.close(self._fds.popleft())
