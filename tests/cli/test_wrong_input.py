"""What a new user gets wrong is answered by one line that says what to do, and status 2."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from asyncdcp.storage.posix import OS
from tests.cli.conftest import Call

_ON_CHECKPOINTS = [("inspect",), ("verify",), ("cat", ...), ("diff", ...)]
_ON_RUNS = [("ls",), ("gc",), ("history",)]


def _arguments(command: tuple[object, ...], path: Path | str) -> list[object]:
    name, *rest = command
    return [name, path, *(("progress.step",) if name == "cat" else (path,) if rest else ())]


@pytest.mark.parametrize("command", [*_ON_CHECKPOINTS, *_ON_RUNS], ids=str)
class TestEveryCommand:
    def test_no_such_path(self, call: Call, command: tuple[object, ...], tmp_path: Path) -> None:
        error = call(*_arguments(command, tmp_path / "no" / "where")).error
        assert error == f"there is no {tmp_path}/no/where; what there is of it is {tmp_path}"

    def test_a_link_to_what_is_not_there(self, call: Call, command: tuple[object, ...], tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to("nowhere")
        for path in (tmp_path / "link", tmp_path / "link" / "step_1"):
            error = call(*_arguments(command, path)).error
            assert error == f"{tmp_path}/link is a link to nowhere, which is not there"

    def test_a_server_of_files_that_does_not_answer(
        self, call: Call, command: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, stat = tmp_path / "mount", os.stat

        def gone(name: Any, **options: Any) -> os.stat_result:
            if str(name).startswith(str(path)):
                raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN), str(path))
            return stat(name, **options)

        monkeypatch.setattr(os, "stat", gone)
        assert call(*_arguments(command, path)).error == f"Transport endpoint is not connected: {path}"

    def test_below_a_file(self, call: Call, command: tuple[object, ...], tmp_path: Path) -> None:
        (tmp_path / "it.txt").write_text("x")
        error = call(*_arguments(command, tmp_path / "it.txt" / "run")).error
        assert error.endswith(f"what there is of it is {tmp_path}/it.txt")

    def test_an_empty_path(self, call: Call, command: tuple[object, ...]) -> None:
        assert "an empty path" in call(*_arguments(command, "")).error

    def test_a_file(self, call: Call, command: tuple[object, ...], tmp_path: Path) -> None:
        (tmp_path / "it.txt").write_text("x")
        assert "a file" in call(*_arguments(command, tmp_path / "it.txt")).error

    def test_an_empty_folder(self, call: Call, command: tuple[object, ...], tmp_path: Path) -> None:
        assert "checkpoint" in call(*_arguments(command, tmp_path)).error

    def test_an_unknown_scheme(self, call: Call, command: tuple[object, ...]) -> None:
        assert "ftp://" in call(*_arguments(command, "ftp://there/run")).error


@pytest.mark.parametrize("command", _ON_CHECKPOINTS, ids=str)
def test_a_run_in_place_of_a_checkpoint(call: Call, command: tuple[object, ...], run: Path) -> None:
    error = call(*_arguments(command, run)).error
    assert error.endswith(f"but in folders of it, such as {run}/step_20; to list them: asyncdcp ls {run}")


@pytest.mark.parametrize("command", _ON_CHECKPOINTS, ids=str)
def test_a_save_that_was_cut_off(call: Call, command: tuple[object, ...], checkpoint: Path) -> None:
    _record(checkpoint).unlink()
    assert call(*_arguments(command, checkpoint)).error.endswith(": a save was cut off there, or is still under way")


@pytest.mark.parametrize("command", _ON_RUNS, ids=str)
def test_a_checkpoint_in_place_of_a_run(call: Call, command: tuple[object, ...], checkpoint: Path) -> None:
    assert f"asyncdcp inspect {checkpoint}" in call(*_arguments(command, checkpoint)).error


@pytest.mark.parametrize("command", _ON_RUNS, ids=str)
def test_a_folder_of_runs(call: Call, command: tuple[object, ...], tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / name).mkdir()
        (tmp_path / name / "term_1.json").touch()
    error = call(*_arguments(command, tmp_path)).error
    assert error == f"{tmp_path} holds runs (a, b, c …), and is none itself; such as: {tmp_path}/a"


def test_a_run_whose_folders_have_other_names(call: Call, run: Path) -> None:
    for name in ("step_10", "step_20"):
        (run / name).rename(run / name.replace("step", "epoch"))
    error = call("ls", run).error
    assert "(epoch_10, epoch_20)" in error and f"asyncdcp inspect {run}/epoch_10" in error


def test_a_damaged_record(call: Call, checkpoint: Path) -> None:
    record = _record(checkpoint)
    record.write_bytes(record.read_bytes()[:-10])
    assert call("inspect", checkpoint).error.startswith(
        f"the checkpoint at {checkpoint} is damaged: {record.name}: not a JSON envelope of asyncdcp"
    )


def test_a_missing_data_file(call: Call, checkpoint: Path) -> None:
    (data,) = checkpoint.glob("*.safetensors")
    data.unlink()
    shown = call("inspect", checkpoint)
    assert shown.status == 1 and f"\n  damaged   the data file {data.name} is missing, and had " in shown.out
    assert "embed.weight" in shown.out, "what it held is told by its index"
    assert call("inspect", checkpoint, "--json").json["damage"].startswith(f"the data file {data.name} is missing")
    damaged = f"the checkpoint at {checkpoint} is damaged: the data file {data.name} is missing"
    assert call("inspect", checkpoint, "--tensor", "*").error.startswith(damaged)
    assert call("diff", checkpoint, checkpoint).status == 0


def test_damaged_bytes(call: Call, checkpoint: Path) -> None:
    spoil(checkpoint)
    error = call("cat", checkpoint, "model.embed.weight").error
    assert "block 0" in error and "model.embed.weight" in error


def test_no_right_to_read(call: Call, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("asyncdcp.cli.targets.open_storage", refuse)
    assert call("inspect", checkpoint).error == f"Permission denied: {checkpoint}; you need the right to read it"


def test_names_that_fit_nothing(call: Call, checkpoint: Path) -> None:
    assert "did you mean model.embed.weight" in call("cat", checkpoint, "model.embed.wieght").error
    assert "did you mean" in call("inspect", checkpoint, "-t", "model.embed.wieght*").error
    assert "names are such as model.embed.weight" in call("inspect", checkpoint, "-t", "qqq").error
    assert "did you mean" in call("diff", checkpoint, checkpoint, "-t", "model.*.bais").error


def test_misspelled_commands_and_options(call: Call, checkpoint: Path) -> None:
    assert call("inpsect").error == "there is no command 'inpsect'; did you mean inspect?"
    assert call("frobnicate").error == "there is no command 'frobnicate'; see asyncdcp --help"
    assert "see asyncdcp inspect --help" in call("inspect", checkpoint, "--jsno").error
    assert "Missing argument 'RUN'" in call("ls").error
    assert "give one of them" in call("cat", checkpoint, "half", "--json", "-o", "x.npy").error
    assert "is a plain value" in call("cat", checkpoint, "progress.step", "-o", "x.npy").error


def test_a_bug_is_a_line_too(call: Call, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("it")

    monkeypatch.setattr("asyncdcp.cli.commands.inspect.entries_of", broken)
    error = call("inspect", checkpoint).error
    assert error.startswith("a bug in asyncdcp: KeyError: 'it'; with ASYNCDCP_TRACEBACK=1")
    monkeypatch.setenv("ASYNCDCP_TRACEBACK", "1")
    with pytest.raises(KeyError):
        call("inspect", checkpoint)


def _record(checkpoint: Path) -> Path:
    (record,) = (path for path in checkpoint.glob("*.json") if "index" not in path.name)
    return record


def spoil(checkpoint: Path) -> None:
    """Flips a bit in the middle of the data."""
    (data,) = checkpoint.glob("*.safetensors")
    content = bytearray(data.read_bytes())
    content[5000] ^= 1
    data.write_bytes(content)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("command", _ON_RUNS, ids=str)
def test_checkpoints_of_another_format_in_place_of_a_run(
    call: Call, command: tuple[object, ...], tmp_path: Path
) -> None:
    for step in (9, 10):
        dcp_save({"weight": torch.ones(2)}, checkpoint_id=tmp_path / f"step_{step}", no_dist=True)
    error = call(*_arguments(command, tmp_path)).error
    assert "checkpoints of another format" in error and error.endswith(f"asyncdcp inspect {tmp_path}/step_10")


def test_verify_of_a_torch_file_says_that_it_has_no_checksums(call: Call, tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "it.pt")
    error = call("verify", tmp_path / "it.pt").error
    assert error.endswith(f"asyncdcp convert {tmp_path}/it.pt DST makes a checkpoint that has them")


def test_a_file_in_a_folder_that_is_not_there(call: Call, checkpoint: Path, run: Path, tmp_path: Path) -> None:
    path = tmp_path / "no" / "file"
    for words in (("cat", checkpoint, "model.embed.weight"), ("report", run)):
        assert call(*words, "-o", path).error == f"{path} cannot be written: there is no folder {path.parent}"


def test_a_metric_that_no_save_has(call: Call, run: Path) -> None:
    error = call("history", run, "-m", "nothing-like-it").error
    assert error.startswith("nothing is named nothing-like-it") and "CKPT" not in error


def test_an_output_that_cannot_be_written_is_named(call: Call, checkpoint: Path, tmp_path: Path) -> None:
    name = "x" * 250 + ".npy"
    error = call("cat", checkpoint, "model.embed.weight", "-o", tmp_path / name).error
    assert error == f"{tmp_path / name} cannot be written: File name too long"
    error = call("cat", checkpoint, "model.embed.weight", "-o", "/dev/full").error
    assert error.startswith("/dev/full cannot be written: No space left on device; make room")


def test_what_cannot_be_opened_is_not_damaged(call: Call, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = OS.open

    def limited(self: OS, path: str, flags: int, /) -> int:
        if path.endswith(".safetensors"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return system(self, path, flags)

    monkeypatch.setattr(OS, "open", limited)
    error = call("verify", checkpoint).error
    assert error.startswith(f"cannot open {checkpoint}/") and error.endswith(".safetensors: Permission denied")
