"""How much memory is left to this process: the machine's, and that of each cgroup it is in.

The functions that parse take the files' text; ``tightest`` reads the files. RLIMIT_AS is not looked at: it bounds
addresses, not memory, and the mapping itself fails by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from asyncdcp.errors import MemoryLimit

_UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as the greatest multiple of a page


@dataclass(frozen=True)
class Headroom:
    """``available`` bytes are left, by ``limit``: the file that says so."""

    available: int
    limit: str


def check_memory(nbytes: int, *, what: str, root: Path = Path("/")) -> None:
    """Raise ``MemoryLimit`` where ``nbytes`` for ``what`` are more than is left; equal to the limit is allowed.

    A look at one moment: others may take the memory before it is used. ``root`` is where ``proc`` and ``sys`` lie.
    """
    left = tightest(root)
    if left is not None and nbytes > left.available:
        raise MemoryLimit(
            f"{what} needs {_mib(nbytes)} of memory, and {_mib(left.available)} are available by {left.limit}; "
            "give a smaller staging_bytes=, and the state is staged in parts through less memory"
        )


def tightest(root: Path = Path("/")) -> Headroom | None:
    """The least headroom of machine and cgroups; None where none of them can be told."""
    return min(_headrooms(root), key=lambda headroom: headroom.available, default=None)


def parse_meminfo(text: str) -> int | None:
    """The bytes of ``MemAvailable`` in /proc/meminfo (kernel 3.14 and newer); None where there is no such line."""
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return None


def parse_cgroups(text: str) -> list[tuple[int, str]]:
    """What /proc/self/cgroup says about memory: (version 1 or 2, path in that hierarchy), in order of the lines."""
    found = []
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            found.append((2, path))
        elif "memory" in controllers.split(","):
            found.append((1, path))
    return found


def parse_headroom(limit: str, usage: str, stat: str) -> int | None:
    """The bytes a cgroup has left, from its files' text; None without a limit.

    Counted as left is also the inactive page cache, which the kernel gives back first: ``total_inactive_file``
    (version 1, with descendants) or ``inactive_file`` (version 2, whose numbers contain descendants).
    """
    if limit.strip() == "max" or int(limit) >= _UNLIMITED:
        return None
    fields = dict(line.split(maxsplit=1) for line in stat.splitlines() if line)
    reclaimable = int(fields.get("total_inactive_file", fields.get("inactive_file", "0")))
    return max(0, int(limit) - int(usage) + reclaimable)


def ancestors(path: str) -> Iterable[str]:
    """``path`` of a cgroup and those above it, relative to the mount, the root (``.``) last.

    In a container the path may be the host's, or point above the mount by ``..``: such folders do not exist here, and
    the root of the mount is the container's own.
    """
    parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
    return ["/".join(parts[:depth]) or "." for depth in range(len(parts), -1, -1)]


def _headrooms(root: Path) -> Iterator[Headroom]:
    meminfo = _read(root / "proc/meminfo")
    if meminfo is not None and (available := parse_meminfo(meminfo)) is not None:
        yield Headroom(available, "MemAvailable in /proc/meminfo")
    for version, path in parse_cgroups(_read(root / "proc/self/cgroup") or ""):
        mount, names = _LAYOUT[version]
        for below in ancestors(path):
            folder = root / mount / below
            texts = [_read(folder / name) for name in names]
            if None not in texts and (left := parse_headroom(*(text or "" for text in texts))) is not None:
                yield Headroom(left, f"/{(folder / names[0]).relative_to(root)}")


_LAYOUT = {
    1: ("sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")),
    2: ("sys/fs/cgroup", ("memory.max", "memory.current", "memory.stat")),
}


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):,.1f} MiB"
