"""What the commands find in a run that was really saved."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import msgspec
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from asyncdcp import AsyncCheckpointer, CheckpointManager, PerRank, SaveResult, SyncCheckpointer
from asyncdcp.cli import targets
from asyncdcp.cli.opening import damage_of
from asyncdcp.pipeline.formats import ReadableCheckpoint
from asyncdcp.runs import Saved
from asyncdcp.storage.object_store import ObjectStorage
from tests.cli.conftest import Call, Small
from tests.cli.test_wrong_input import spoil
from tests.ranks.conftest import Job, everywhere, job, rows

__all__ = ["everywhere", "job"]


class TestInspect:
    def test_the_tree(self, call: Call, checkpoint: Path) -> None:
        lines = call("inspect", checkpoint).out.splitlines()
        assert lines[0] == str(checkpoint)
        text = "\n".join(lines)
        assert "├─ layers.0…2  3 alike" in text
        assert "├─ embed.weight" in text and "├─ weight            → model.embed.weight" in text
        assert "metadata  note = 'small'" in text
        assert "bfloat16" in text and "('a', 1)" in text and "inf" in text

    def test_all_and_depth(self, call: Call, checkpoint: Path) -> None:
        everything = call("inspect", checkpoint, "--all").out
        assert "alike" not in everything and "model.layers" not in everything
        one = call("inspect", checkpoint, "--depth", 1).out
        assert len(one.splitlines()) < len(everything.splitlines()) and "… more inside" in one

    def test_json_has_every_entry(self, call: Call, checkpoint: Path) -> None:
        found = call("inspect", checkpoint, "--json").json
        entries = {entry["name"]: entry for entry in found["entries"]}
        assert found["metadata"] == {"note": "small"} and found["world_size"] == 1
        assert entries["progress.step"] == {"name": "progress.step", "kind": "value", "value": 10}
        assert entries["half"]["dtype"] == "bfloat16" and entries["half"]["bytes"] == 80
        assert {entries[name]["alias_of"] for name in ("model.embed.weight", "model.head.weight")} == {
            None,
            "model.embed.weight",
        }

    def test_statistics(self, call: Call, checkpoint: Path) -> None:
        (bias, half) = call("inspect", checkpoint, "-t", "model.head.bias", "-t", "half", "--json").json
        expected = Small().head.bias.detach().numpy().astype("f8") + 0.5
        assert bias["mean"] == pytest.approx(expected.mean(), rel=1e-6)
        assert bias["first"] == pytest.approx(expected[:4], rel=1e-6)
        assert half["max"] == pytest.approx(expected.max(), rel=1e-2)
        table = call("inspect", checkpoint, "-t", "model.head.*").out
        assert "MEAN" in table and "model.head.weight" in table

    def test_one_that_is_replaced_meanwhile_is_no_damage(
        self, call: Call, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        replaced: list[SaveResult] = []

        async def replacing(target: str, reader: ReadableCheckpoint) -> str | None:
            if not replaced:
                async with AsyncCheckpointer(process=False) as checkpointer:
                    replaced.append(await checkpointer.save(target, {"x": 1}, overwrite=True))
            return await damage_of(target, reader)

        monkeypatch.setattr("asyncdcp.cli.commands.inspect.damage_of", replacing)
        found = call("inspect", checkpoint, "--json").json
        assert found["damage"] is None and found["save_id"] == replaced[0].save_id

    def test_a_checkpoint_of_nothing(self, call: Call, tmp_path: Path) -> None:
        with SyncCheckpointer(process=False) as checkpointer:
            checkpointer.save(tmp_path / "c", {})
        assert "holds     0 tensors of 0 B, 0 plain values" in call("inspect", tmp_path / "c").out
        assert call("diff", tmp_path / "c", tmp_path / "c", "--values").status == 0
        assert call("inspect", tmp_path / "c", "-t", "*").error.endswith("the checkpoint holds no tensors")

    def test_empty_and_scalar_tensors(self, call: Call, tmp_path: Path) -> None:
        with SyncCheckpointer(process=False) as checkpointer:
            checkpointer.save(tmp_path / "c", {"e": torch.ones(0, 3), "s": torch.tensor(2.5)})
        assert "empty" in call("inspect", tmp_path / "c", "-t", "*").out
        assert call("cat", tmp_path / "c", "s", "--json").json == 2.5
        assert call("cat", tmp_path / "c", "e", "--json").json == []
        assert call("diff", tmp_path / "c", tmp_path / "c", "--values").status == 0

    def test_a_hostile_name_cannot_steer_the_terminal(self, call: Call, tmp_path: Path) -> None:
        with SyncCheckpointer(process=False) as checkpointer:
            checkpointer.save(tmp_path / "c", {"a\x1b[2Jb\n": torch.ones(2), "v": "\x1b]0;title\x07"})
        for command in (("inspect",), ("inspect", "-t", "*"), ("diff", tmp_path / "c", "--values")):
            out = call(command[0], tmp_path / "c", *command[1:]).out
            assert "\x1b" not in out and "\x07" not in out
        assert "a\\x1b[2Jb\\n" in call("inspect", tmp_path / "c").out


class TestSharded:
    """A checkpoint of three ranks, each with rows of its own."""

    @pytest.fixture
    def sharded(self, job: Callable[..., Job], tmp_path: Path) -> Path:
        whole = torch.arange(42, dtype=torch.float32).view(7, 6)

        def state(rank: int) -> dict[str, Any]:
            return {"w": rows(whole, rank, 3), "all": torch.ones(4), "seed": PerRank({"it": 7 + rank})}

        for result in job(3).save(tmp_path / "sharded", state):
            assert not isinstance(result, BaseException), result
        return tmp_path / "sharded"

    def test_inspect(self, call: Call, sharded: Path) -> None:
        out = call("inspect", sharded).out
        assert "by 3 ranks" in out and "in 3 files" in out
        (line,) = (line for line in out.splitlines() if line.startswith("w "))
        assert line.split() == ["w", "float32", "[7,", "6]", "168", "B", "3", "0-0,", "1-0,", "2-0"]
        (found,) = call("inspect", sharded, "-t", "w", "--json").json
        assert (found["chunks"], found["mean"], found["max"], found["zeros"]) == (3, 20.5, 41, 1)

    def test_cat_and_diff(self, call: Call, sharded: Path) -> None:
        assert call("cat", sharded, "w", "--json").json == np.arange(42.0).reshape(7, 6).tolist()
        assert call("diff", sharded, sharded, "--values").status == 0
        assert call("verify", sharded).out.startswith(f"whole    {sharded}  ")


class TestCat:
    def test_npy(self, call: Call, checkpoint: Path, tmp_path: Path) -> None:
        ran = call("cat", checkpoint, "model.head.weight", "-o", tmp_path / "w.npy")
        assert (ran.status, ran.out) == (0, "") and "float32 [40, 16]" in ran.err
        np.testing.assert_array_equal(np.load(tmp_path / "w.npy"), Small().head.weight.detach().numpy())
        assert os.listdir(tmp_path) == ["w.npy"] or not list(tmp_path.glob("*.partial"))

    def test_npy_into_a_pipe_and_through_a_link_which_stay_what_they_are(
        self, call: Call, checkpoint: Path, tmp_path: Path
    ) -> None:
        pipe, link, file = (tmp_path / name for name in ("pipe", "link", "w.npy"))
        os.mkfifo(pipe)
        link.symlink_to(file)
        reading = os.open(pipe, os.O_RDWR)  # never waits for the other end
        try:
            for path in (pipe, link):
                assert call("cat", checkpoint, "model.head.weight", "-o", path).status == 0
            piped = os.read(reading, 1 << 16)
        finally:
            os.close(reading)
        assert pipe.is_fifo() and link.is_symlink() and piped == file.read_bytes()
        np.testing.assert_array_equal(np.load(file), Small().head.weight.detach().numpy())

    def test_npy_to_the_standard_output(self, checkpoint: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
        from asyncdcp.cli.main import main

        assert main(["cat", str(checkpoint), "half", "-o", "-"]) == 0
        array = np.load(io.BytesIO(capfdbinary.readouterr().out))
        assert array.dtype == np.float32 and array.shape == (40,)

    def test_text_and_json(self, call: Call, checkpoint: Path) -> None:
        assert call("cat", checkpoint, "half").out.startswith("half  bfloat16 [40]\n[")
        assert call("cat", checkpoint, "half", "--json").json == pytest.approx(
            call("cat", checkpoint, "model.head.bias", "--json").json, rel=1e-2
        )
        assert call("cat", checkpoint, "progress.tags").out == "('a', 1)\n"
        assert call("cat", checkpoint, "progress.tags", "--json").json == {"tuple": ["a", 1]}

    def test_a_full_disk_leaves_no_file(self, call: Call, checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("asyncdcp.cli.commands.cat._save", full)
        before = sorted(tmp_path.iterdir())
        error = call("cat", checkpoint, "half", "-o", tmp_path / "h.npy").error
        assert error.startswith(f"{tmp_path / 'h.npy'} cannot be written: No space left on device; make room")
        assert sorted(tmp_path.iterdir()) == before


class TestDiff:
    def test_itself(self, call: Call, checkpoint: Path) -> None:
        ran = call("diff", checkpoint, checkpoint, "--values")
        assert ran.status == 0
        assert "the same" in ran.out and "changed:" not in ran.out

    def test_what_changed_and_moved(self, call: Call, run: Path) -> None:
        ran = call("diff", run / "step_10", run / "step_20", "--values", "--json")
        assert ran.status == 1
        assert {"name": "progress.step", "kind": "changed", "a": "10", "b": "20"} in ran.json["differences"]
        moved = {each["name"]: each for each in ran.json["values"]}
        assert moved["model.head.bias"]["max"] == pytest.approx(0.5, rel=1e-6)
        assert moved["model.embed.weight"]["changed"] == 0
        text = call("diff", run / "step_10", run / "step_20", "--values").out
        assert "~ progress.step  10 → 20" in text and "model.head.bias" in text

    def test_structure(self, call: Call, checkpoint: Path, tmp_path: Path) -> None:
        with SyncCheckpointer(process=False) as checkpointer:
            checkpointer.save(tmp_path / "other", {"half": torch.ones(3), "more": torch.ones(1)})
        ran = call("diff", checkpoint, tmp_path / "other", "--values")
        assert ran.status == 1
        assert "+ more  float32 [1]" in ran.out and "- model.embed.weight  float32 [40, 16]" in ran.out
        assert "~ half  bfloat16 [40] → float32 [3]" in ran.out
        assert call("diff", checkpoint, tmp_path / "other", "-t", "rng.p*", "--json").json["differences"]


class TestElsewhere:
    """Places that are no folders, and formats that are others'."""

    def test_a_url(self, call: Call, tmp_path: Path) -> None:
        pytest.importorskip("obstore")
        with CheckpointManager("memory://cli/run", process=False) as manager:
            manager.save(5, {"w": torch.arange(3.0)}, metrics={"loss": 0.5}).result()
        assert call("ls", "memory://cli/run").out.splitlines()[1].split()[:2] == ["5", "committed"]
        assert call("inspect", "memory://cli/run/step_5").out.startswith("memory://cli/run/step_5\n")
        assert call("cat", "memory://cli/run/step_5", "w", "--json").json == [0, 1, 2]
        assert call("verify", "memory://cli/run/step_5").status == 0
        assert len(call("history", "memory://cli/run", "--json").json) == 1
        assert call("gc", "memory://cli/run").out == "nothing to delete\n"
        assert call("report", "memory://cli/run", "-o", tmp_path / "r.html").status == 0
        assert "such as memory://cli/run/step_5" in call("inspect", "memory://cli/run").error
        assert "asyncdcp inspect" in call("ls", "memory://cli/run/step_5").error

    @pytest.mark.parametrize("trouble", [None, "cannot list s3://bucket/run:\nConnection refused"])
    def test_a_url_that_takes_long_is_not_silent(self, monkeypatch: pytest.MonkeyPatch, trouble: str | None) -> None:
        said: list[tuple[str, bool]] = []
        heard = list[anyio.Event]()

        def echo(text: str, *, err: bool) -> None:
            said.append((text, err))
            heard[0].set()
            raise BrokenPipeError

        async def slow(places: tuple[str, str]) -> int:
            heard.append(anyio.Event())
            await heard[0].wait()
            return 3

        async def asked(storage: ObjectStorage) -> str | None:
            assert str(storage.url) == "s3://bucket/run"
            return trouble

        monkeypatch.setattr(targets, "PATIENCE", 0.0)
        monkeypatch.setattr("asyncdcp.cli.targets.click.echo", echo)
        monkeypatch.setattr(ObjectStorage, "trouble", asked)
        assert targets.run(slow, ("file:///here", "s3://bucket/run")) == 3
        why = "the store answers, and takes long"
        if trouble:
            why = "cannot list s3://bucket/run: Connection refused; it is asked again, for up to 3 minutes"
        assert said == [(f"asyncdcp: still at work with s3://bucket/run: {why}", True)]

    def test_another_format(self, call: Call, tmp_path: Path) -> None:
        file = tmp_path / "model.safetensors"
        save_file({"w": np.arange(6, dtype=np.float32)}, file)
        assert "in another format" in call("inspect", file).out
        assert call("cat", file, "w", "--json").json == [0, 1, 2, 3, 4, 5]
        assert call("diff", file, file, "--values").status == 0
        assert f"asyncdcp convert {tmp_path} DST" in call("verify", tmp_path).error


class TestVerify:
    def test_whole_and_damaged(self, call: Call, run: Path) -> None:
        spoil(run / "step_20")
        ran = call("verify", run / "step_10", run / "step_20")
        assert ran.status == 1
        whole, damaged, why = ran.out.splitlines()
        assert whole.startswith(f"whole    {run}/step_10") and damaged.startswith(f"damaged  {run}/step_20")
        assert "block 0" in why and "model.embed.weight" in why
        (report,) = call("verify", run / "step_20", "--json").json
        assert not report["ok"] and report["damages"][0]["kind"] == "checksum"

    def test_one_that_cannot_be_looked_at_keeps_no_other(self, call: Call, run: Path) -> None:
        ran = call("verify", run / "step_15", run / "step_10")
        assert ran.status == 2 and "whole" in ran.out and "there is no" in ran.err


class TestLs:
    def test_states(self, call: Call, run: Path) -> None:
        _cut_off(run, "step_20", "step_30")
        (next((run / "step_20").glob("*.safetensors"))).unlink()
        out = call("ls", run).out.splitlines()
        assert [line.split()[:2] for line in out[1:4]] == [["10", "committed"], ["20", "damaged"], ["30", "partial"]]
        assert "of its data files are missing" in out[2]
        assert out[4].startswith("1 checkpoint to resume from, the latest is step 10")
        found = call("ls", run, "--json").json
        assert [(each["step"], each["state"], each["latest"]) for each in found] == [
            (10, "committed", True),
            (20, "damaged", False),
            (30, "partial", False),
        ]
        assert found[0]["metadata"] == {"note": "small"} and found[0]["time"].endswith("Z")


class TestGc:
    def test_a_dry_run_changes_nothing(self, call: Call, run: Path) -> None:
        _cut_off(run, "step_20", "step_30", age=7200)
        before = sorted(run.rglob("*"))
        out = call("gc", run).out
        assert "dead save" in out and "step_30" in out
        assert out.endswith(f"could be deleted, and nothing was: asyncdcp gc {run} --delete\n")
        assert sorted(run.rglob("*")) == before

    def test_what_may_be_under_way_is_left_alone(self, call: Call, run: Path) -> None:
        _cut_off(run, "step_20", "step_30")
        out = call("gc", run, "--delete").out
        assert out == "nothing to delete\nleft alone: 1 that something was written to within 3600 s (--older-than)\n"
        assert call("gc", run, "--older-than", 0).out.endswith(f"asyncdcp gc {run} --older-than 0 --delete\n")

    def test_delete(self, call: Call, run: Path) -> None:
        _cut_off(run, "step_20", "step_30", age=7200)
        assert call("gc", run, "--delete", "--json").json[0]["deleted"]
        assert not list((run / "step_30").glob("*.safetensors"))
        assert call("verify", run / "step_10", run / "step_20").status == 0


class TestHistory:
    def test_a_table_and_a_line_for_each_metric(self, call: Call, run: Path) -> None:
        self._write(run, [1.0, 0.5, 0.25])
        *rows, loss = call("history", run).out.splitlines()
        assert len(rows) == 4 and "LOSS" in rows[0] and rows[1].split()[0] == "10"
        assert loss == "loss  █▃▁  1 → 0.25  least 0.25, greatest 1"
        assert len(call("history", run, "--last", 1, "--json").json) == 1
        assert call("history", run, "-m", "lsos").error == "nothing is named lsos; did you mean loss?"

    def test_none(self, call: Call, run: Path) -> None:
        assert call("history", run).out.startswith("no history:")

    @staticmethod
    def _write(run: Path, losses: list[float]) -> None:
        saves = [
            Saved(step=10 * n, term=1, save_id="0" * 20, time=1e9, metrics={"loss": loss})
            for n, loss in enumerate(losses, 1)
        ]
        (run / "history.jsonl").write_bytes(b"".join(msgspec.json.encode(saved) + b"\n" for saved in saves))


def _cut_off(run: Path, step: str, name: str, age: float = 0) -> None:
    """Leaves what a save that was cut off leaves, under another name."""
    (run / name).mkdir()
    for path in (run / step).iterdir():
        if path.suffix == ".safetensors":
            copy = run / name / path.name
            copy.write_bytes(path.read_bytes())
            then = time.time() - age
            os.utime(copy, (then, then))
