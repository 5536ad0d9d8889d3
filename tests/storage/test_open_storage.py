from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from asyncdcp.errors import InvalidOption
from asyncdcp.storage import LocalPlace, LocalStorage, MemoryStorage, open_place, open_storage


def test_a_storage_is_passed_through() -> None:
    storage = MemoryStorage()
    assert open_storage(storage) is storage


def test_paths_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    targets: dict[str | Path, str] = {
        "runs/x": f"{tmp_path}/runs/x",
        Path("runs/../y"): f"{tmp_path}/y",
        "~/runs": "/home/someone/runs",
        "file:///a/b%20c": "/a/b c",
        "FILE://localhost/a": "/a",
        "odd:name": f"{tmp_path}/odd:name",
    }
    for target, path in targets.items():
        storage = open_storage(target)
        assert isinstance(storage, LocalStorage)
        assert storage.info.location == path
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "target",
    [
        *("hdfs://bucket/x", "s3://", "s3://b/x?y", "s3://b/../x", "gs://b//x"),
        *("file://host/x", "file://", "file:///a?b", "file:///a#b", "", "a\0b"),
    ],
)
def test_what_it_does_not_take(target: str) -> None:
    with pytest.raises(InvalidOption, match=r"path|query|URL"):
        open_storage(target)


@pytest.mark.parametrize("target", ["s3:/bucket/run", Path("gs://bucket/run"), "FILE:/run"])
@pytest.mark.parametrize("opened", [open_storage, open_place])
def test_a_url_with_one_slash_is_no_path(opened: Callable[[Any], Any], target: str | Path) -> None:
    """It would be a folder of that name, here."""
    with pytest.raises(InvalidOption, match=r"two slashes behind the colon, of which pathlib.Path takes one away"):
        opened(target)
    assert isinstance(open_storage(f"./{target}"), LocalStorage)


@pytest.mark.parametrize("target", [3, None, b"x", object()])
def test_other_types_are_named(target: object) -> None:
    with pytest.raises(InvalidOption, match=r"takes a path"):
        open_storage(cast(Any, target))


def test_a_storage_is_no_place_of_a_run() -> None:
    with pytest.raises(InvalidOption, match="a Place, which holds many checkpoints; a Storage holds one"):
        open_place(cast(Any, MemoryStorage()))


def test_bytes_are_no_path() -> None:
    with pytest.raises(InvalidOption, match="path is b'x'; it takes the path of a directory"):
        LocalStorage(cast(Any, b"x"))


@pytest.mark.parametrize("kind", [LocalStorage, LocalPlace])
def test_a_current_directory_that_was_deleted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: type[LocalStorage | LocalPlace]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(InvalidOption, match="path is 'run', and the current directory was deleted: change to one"):
        kind("run")
    kind(tmp_path / "run")
