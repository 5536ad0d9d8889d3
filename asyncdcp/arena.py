"""The arena: shared memory laid out as slots of one slab each.

The trainer makes an ``Arena``, the worker attaches to its file descriptor. Which slab uses which slot is for a
``slot_ring.SlotRing`` to say.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import threading
import warnings
import weakref
from collections.abc import Callable

from asyncdcp.errors import Closed, InvalidOption, MemoryLimit
from asyncdcp.memory_limits import check_memory

ALIGNMENT = 4096
_PREFAULT_STEP = 64 << 20
_MADV_POPULATE_WRITE = 23  # Linux 5.14; Python's mmap does not name it
_OUT_OF_MEMORY = (errno.ENOMEM, errno.ENOSPC, errno.EFAULT)  # EFAULT: populating ran into what would be a SIGBUS

# By ctypes because it releases the GIL, and because mmap.mmap keeps a duplicate of the descriptor open (until 3.13) and
# refuses to unmap while a view is alive, where we want the last view to unmap.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Arena:
    """A memfd of ``slots`` × ``slot_bytes``, mapped shared and writable; zeros at first.

    Guaranteed:

    - ``close`` always works: it closes the descriptor at once, and the mapping goes with the last view of it (a
      memoryview, a slice, an array made from one). An ``address`` keeps nothing alive.
    - The mapping is neither inherited by ``os.fork()`` nor part of a core dump; in such a child the descriptor is
      closed, every access through this object raises ``Closed``, and views made before must not be touched.
    - The descriptor is not inherited over ``exec``; hand it on by name. Nobody can change the memfd's size.

    ``slot_bytes`` is a multiple of 4,096. Raises ``MemoryLimit`` where the machine or a cgroup has not that much left,
    before anything is made.
    """

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self._fd: int | None = None
        _check_size(slots, slot_bytes)
        check_memory(slots * slot_bytes, what="the staging arena")
        with _making:
            self._make(slots, slot_bytes)

    def _make(self, slots: int, slot_bytes: int) -> None:
        fd = os.memfd_create("asyncdcp-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, slots * slot_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self._map(fd, slots, slot_bytes)
        except BaseException as error:
            os.close(fd)
            if isinstance(error, OSError) and error.errno == errno.EFBIG:
                raise _translated(error.errno, slots * slot_bytes, ", or raise RLIMIT_FSIZE (ulimit -f)") from error
            raise

    @classmethod
    def attach(cls, fd: int, slots: int, slot_bytes: int) -> Arena:
        """The same memory in another process, by a descriptor that came from there; owns ``fd`` from then on.

        Raises ``InvalidOption``, and does not take ``fd``, if it is smaller than ``slots`` × ``slot_bytes``, so that no
        access can end in SIGBUS.
        """
        _check_size(slots, slot_bytes)
        size = os.fstat(fd).st_size
        if size < slots * slot_bytes:
            raise InvalidOption(f"fd {fd} has {size} bytes, an arena of {slots} * {slot_bytes} has more")
        arena = cls.__new__(cls)
        arena._fd = None
        arena._map(fd, slots, slot_bytes)
        return arena

    def _map(self, fd: int, slots: int, slot_bytes: int) -> None:
        nbytes = slots * slot_bytes
        address = _libc.mmap(None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
        if address == ctypes.c_void_p(-1).value:
            code = ctypes.get_errno()
            bounded = code == errno.ENOMEM and resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
            raise _translated(code, nbytes, ", or raise RLIMIT_AS (ulimit -v)" if bounded else "")
        for advice in (mmap.MADV_DONTFORK, mmap.MADV_DONTDUMP):
            _libc.madvise(address, nbytes, advice)  # a kernel without core dumps may refuse one; no harm
        memory = (ctypes.c_char * nbytes).from_address(address)
        # All views hold `memory`, so its end is the last view's. At exit the process unmaps everything by itself, and
        # a thread that is still in the memory must not crash: hence not atexit.
        weakref.finalize(memory, _unmap, address, nbytes, os.getpid()).atexit = False
        self.slots, self.slot_bytes = slots, slot_bytes
        self._memory: ctypes.Array[ctypes.c_char] | None = memory
        self._address: int = address
        self._pid = os.getpid()
        self._lock, self._closing = threading.Lock(), False
        self._fd = fd
        _living.add(self)

    # ── access ──

    @property
    def fd(self) -> int:
        """The memfd's descriptor, to be sent to the worker."""
        return self._opened()[0]

    @property
    def address(self) -> int:
        """Where the mapping begins; valid until ``close``."""
        self._opened()
        return self._address

    @property
    def nbytes(self) -> int:
        """The size of the whole arena."""
        return self.slots * self.slot_bytes

    @property
    def buffer(self) -> memoryview:
        """The whole arena: writable bytes. Each call makes a view of its own, which the caller may release."""
        return memoryview(self._opened()[1]).cast("B")

    def slot(self, n: int) -> memoryview:
        """Slot ``n``: ``slot_bytes`` writable bytes."""
        if not 0 <= n < self.slots:
            raise IndexError(f"slot {n} of an arena of {self.slots}")
        return self.buffer[n * self.slot_bytes : (n + 1) * self.slot_bytes]

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._fd is None

    def _opened(self) -> tuple[int, ctypes.Array[ctypes.c_char]]:
        if os.getpid() != self._pid:
            raise Closed(f"the arena belongs to process {self._pid}: a fork does not inherit its memory")
        fd, memory = self._fd, self._memory
        if fd is None or memory is None:
            raise Closed("the arena is closed")
        return fd, memory

    # ── prefaulting ──

    def prefault(
        self, *, progress: Callable[[int], object] | None = None, should_stop: Callable[[], bool] | None = None
    ) -> int:
        """Take the memory now, so that the first copy does not; returns the bytes taken, contents unchanged.

        Blocks, with the GIL released (a thread's work); in steps of at most 64 MiB, from the start. Between steps
        ``progress(bytes so far)`` is called, and ``should_stop()`` or ``close`` on another thread ends it early. A
        kernel without MADV_POPULATE_WRITE still gets the pages, and maps them at first touch. Raises ``MemoryLimit``
        where memory runs out.
        """
        self._opened()
        taken, populates = 0, True
        while taken < self.nbytes and not (should_stop is not None and should_stop()):
            step = min(_PREFAULT_STEP, self.nbytes - taken)
            with self._lock:  # close() waits for a step, else its descriptor and addresses might be someone else's now
                if self._fd is None or self._closing:
                    break
                self._allocate(self._fd, taken, step)
                populates = populates and self._populate(taken, step)
            taken += step
            if progress is not None:
                progress(taken)
        return taken

    def prefault_slot(self, n: int) -> None:
        """As ``prefault``, for one slot. Slots may be prefaulted on several threads at once; not against ``close``."""
        begin = n * self.slot_bytes
        fd, _ = self._opened()
        self._allocate(fd, begin, self.slot_bytes)
        self._populate(begin, self.slot_bytes)

    def _allocate(self, fd: int, offset: int, length: int) -> None:
        try:
            os.posix_fallocate(fd, offset, length)
        except OSError as error:
            raise _translated(error.errno, length) from error

    def _populate(self, offset: int, length: int) -> bool:
        """Whether the kernel knows how to populate. Touching instead would race with who writes, so it is left out."""
        while _libc.madvise(self._address + offset, length, _MADV_POPULATE_WRITE) != 0:
            code = ctypes.get_errno()
            if code in (errno.EINVAL, errno.ENOSYS):
                return False
            if code not in (errno.EINTR, errno.EAGAIN):
                raise _translated(code, length)
        return True

    # ── the end ──

    def close(self) -> None:
        """Close the descriptor and give the mapping up, which ends with the last view of it. Idempotent."""
        if self._fd is None:
            return
        if os.getpid() != self._pid:  # a fork's copy: its lock may have been held by a thread that is not there
            self._lock = threading.Lock()
        self._closing = True  # before the lock, which prefault would else take again and again
        with self._lock, _making:
            fd, self._fd = self._fd, None
            if fd is not None:
                os.close(fd)
        self._memory = None  # unmapping takes its time, and delays no fork

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", None) is not None and os.getpid() == self._pid:
            said = f"unclosed {self!r}"
            self.close()  # before the warning, which may be an error
            warnings.warn(said, ResourceWarning, source=self, stacklevel=2)

    def __repr__(self) -> str:
        return f"<Arena {self.slots}*{self.slot_bytes} fd={self._fd}>"


def _check_size(slots: int, slot_bytes: int) -> None:
    if slots < 1:
        raise InvalidOption(f"an arena has at least one slot, not slots={slots}")
    if slot_bytes < 1 or slot_bytes % ALIGNMENT:
        raise InvalidOption(f"slot_bytes={slot_bytes} is not a positive multiple of {ALIGNMENT}")


def _unmap(address: int, nbytes: int, pid: int) -> None:
    if os.getpid() == pid:  # in a fork's child nothing of ours lies there, and maybe something of others
        _libc.munmap(address, nbytes)


def _translated(code: int | None, nbytes: int, way_out: str = "") -> Exception:
    if code in _OUT_OF_MEMORY or way_out:
        return MemoryLimit(
            f"the staging arena could not take {nbytes:,} bytes of memory ({os.strerror(code or 0)}); give a smaller "
            f"staging_bytes={way_out}"
        )
    return OSError(code, os.strerror(code or 0))


# Fork handlers are one per process, and cannot be removed. Without this one a DataLoader's child would keep the memory
# of every arena that was open when it was forked.
_living: weakref.WeakSet[Arena] = weakref.WeakSet()
_making = threading.RLock()
"""Held while a descriptor is made or closed, and by a fork: else the child kept one that no living arena has."""


def _after_fork() -> None:
    try:
        for arena in list(_living):
            arena.close()
        _living.clear()
    finally:
        _making.release()


os.register_at_fork(before=_making.acquire, after_in_parent=_making.release, after_in_child=_after_fork)
