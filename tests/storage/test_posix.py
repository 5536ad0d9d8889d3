from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest

from asyncdcp.storage.posix import OS, PAGE, filesystem_of

MOUNTS = r"""22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
30 27 0:25 / /data rw - xfs /dev/vdb rw
31 30 0:26 / /data/with\040space rw master:7 - nfs4 host:/x rw
32 27 0:27 / /data rw - btrfs /dev/vdc rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/proc", "proc"),
        ("/processes", "ext4"),
        ("/data/x/y", "btrfs"),
        ("/data/with space", "nfs4"),
        ("/data/with space/x", "nfs4"),
        ("/data/with spaces", "btrfs"),
    ],
)
def test_the_longest_and_last_mount_point_counts(path: str, kind: str) -> None:
    assert filesystem_of(path, MOUNTS) == kind
    assert filesystem_of(path, "") == "unknown"


def test_filesystem_of_what_is_mounted_here(tmp_path: Path) -> None:
    assert OS().filesystem("/proc/self") == "proc"
    assert OS().filesystem(str(tmp_path / "not" / "there")) not in ("proc", "unknown")


def test_ctypes_calls_raise_the_errno(tmp_path: Path) -> None:
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    with pytest.raises(FileNotFoundError) as missing:
        OS().rename_noreplace(a, b)
    assert (missing.value.filename, missing.value.filename2) == (a, b)
    Path(a).touch()
    Path(b).touch()
    with pytest.raises(FileExistsError):
        OS().rename_noreplace(a, b)
    os.unlink(b)
    OS().rename_noreplace(a, b)
    assert os.listdir(tmp_path) == ["b"]
    with pytest.raises(OSError) as bad:
        OS().fallocate(-1, 10)
    assert bad.value.errno == errno.EBADF
    assert OS().cached_pages(-1, 0, 1) is None
    assert OS().direct_alignment(-1) == 4096


def test_fallocate_is_exact_beyond_32_bits(tmp_path: Path) -> None:
    fd = OS().open(str(tmp_path / "a"), os.O_CREAT | os.O_WRONLY)
    try:
        OS().fallocate(fd, 12_345)
        assert OS().fstat(fd)[:2] == (12_345, 1)
        with pytest.raises(OSError) as full:
            OS().fallocate(fd, 1 << 62)
        assert full.value.errno in (errno.ENOSPC, errno.EFBIG)
    finally:
        os.close(fd)


def test_direct_flag_and_alignment(tmp_path: Path) -> None:
    fd = OS().open(str(tmp_path / "a"), os.O_CREAT | os.O_WRONLY)
    try:
        alignment = OS().direct_alignment(fd)
        assert alignment == 0 or alignment & (alignment - 1) == 0
        OS().set_direct(fd, on=True)
        assert OS().pwrite(fd, memoryview(mmap.mmap(-1, 4096)), 0) == 4096
        with pytest.raises(OSError):
            OS().pwrite(fd, memoryview(b"abc"), 4096)
        OS().set_direct(fd, on=False)
        assert OS().pwrite(fd, memoryview(b"abc"), 4096) == 3
    finally:
        os.close(fd)


def test_cached_pages_counts_and_reads_nothing(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "a", os.O_CREAT | os.O_RDWR)
    try:
        os.write(fd, bytes(PAGE * 10))
        os.fsync(fd)
        if OS().cached_pages(fd, 0, PAGE * 10) is None:
            pytest.skip("the kernel has no cachestat")
        assert OS().cached_pages(fd, 1, PAGE) == 2
        OS().drop_cache(fd)
        left = OS().cached_pages(fd, 0, PAGE * 10)
        assert OS().cached_pages(fd, 0, PAGE * 10) == left
    finally:
        os.close(fd)


def test_scan_follows_links_and_passes_over_broken_ones(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "alias").symlink_to("file")
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "through").symlink_to("file/below")
    (tmp_path / "dir").mkdir()
    found = OS().scan(str(tmp_path))
    assert set(found) == {"file", "alias", "dir"}
    assert found["alias"].size == found["file"].size == 3
