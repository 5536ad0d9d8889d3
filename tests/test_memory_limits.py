"""Memory limits, by sample texts and by this machine's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncdcp.errors import MemoryLimit
from asyncdcp.memory_limits import (
    Headroom,
    ancestors,
    check_memory,
    parse_cgroups,
    parse_headroom,
    parse_meminfo,
    tightest,
)

MIB = 1 << 20
MEMINFO = "MemTotal:       16000000 kB\nMemFree:          100000 kB\nMemAvailable:    2000000 kB\nBuffers: 1 kB\n"


def test_meminfo() -> None:
    assert parse_meminfo(MEMINFO) == 2_000_000 * 1024
    assert parse_meminfo("MemTotal: 1 kB\n") is None


def test_cgroups_of_both_versions() -> None:
    text = "9:name=systemd:/a\n4:cpu,memory:/jobs/17:x\n0::/user.slice/a\n"
    assert parse_cgroups(text) == [(1, "/jobs/17:x"), (2, "/user.slice/a")]


def test_headroom_counts_inactive_page_cache() -> None:
    assert parse_headroom("1000\n", "400\n", "anon 10\ninactive_file 150\nactive_file 5\n") == 750
    assert parse_headroom("1000\n", "400\n", "inactive_file 1\ntotal_inactive_file 150\n") == 750
    assert parse_headroom("1000", "2000", "") == 0
    assert parse_headroom("max\n", "400\n", "") is None
    assert parse_headroom("9223372036854771712\n", "400\n", "") is None


def test_ancestors_end_at_the_root() -> None:
    assert list(ancestors("/a/b")) == ["a/b", "a", "."]
    assert list(ancestors("/")) == ["."]
    assert list(ancestors("/../x")) == ["x", "."]


def put(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def version_2(folder: str, limit: str, usage: str) -> dict[str, str]:
    base = f"sys/fs/cgroup/{folder}"
    return {
        f"{base}/memory.max": limit,
        f"{base}/memory.current": usage,
        f"{base}/memory.stat": "inactive_file 4096\n",
    }


def test_the_tightest_of_machine_and_cgroups_counts(tmp_path: Path) -> None:
    assert tightest(tmp_path) is None
    check_memory(1 << 60, what="it", root=tmp_path)
    put(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/job/step\n"})
    assert tightest(tmp_path) == Headroom(2_000_000 * 1024, "MemAvailable in /proc/meminfo")
    put(tmp_path, version_2("job/step", "max\n", "1\n") | version_2("job", f"{10 * MIB}\n", f"{6 * MIB}\n"))
    assert tightest(tmp_path) == Headroom(4 * MIB + 4096, "/sys/fs/cgroup/job/memory.max")


def test_version_1_in_a_container_without_the_hosts_path(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/memory"
    put(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/0123\n0::/\n",
            f"{base}/memory.limit_in_bytes": f"{8 * MIB}\n",
            f"{base}/memory.usage_in_bytes": f"{5 * MIB}\n",
            f"{base}/memory.stat": f"inactive_file 1\ntotal_inactive_file {MIB}\n",
        },
    )
    assert tightest(tmp_path) == Headroom(4 * MIB, "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def test_the_refusal_names_need_rest_limit_and_way_out(tmp_path: Path) -> None:
    put(tmp_path, {"proc/self/cgroup": "0::/job\n"} | version_2("job", f"{10 * MIB}\n", f"{6 * MIB + 4096}\n"))
    check_memory(4 * MIB, what="the arena", root=tmp_path)
    with pytest.raises(MemoryLimit) as info:
        check_memory(4 * MIB + 1, what="the arena", root=tmp_path)
    for part in ("the arena", "4.0 MiB", "/sys/fs/cgroup/job/memory.max", "staging_bytes="):
        assert part in str(info.value)


def test_this_machine_says_something() -> None:
    found = tightest()
    assert found is not None
    assert found.available > 0
