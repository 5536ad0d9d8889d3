"""The programs work: every case on a state that is too small to say anything."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tests.benchmarks import child, transfer
from tests.benchmarks.__main__ import arguments, main
from tests.benchmarks.cases import CASES, transport
from tests.benchmarks.measuring import Setting
from tests.benchmarks.peers.own import OwnThread
from tests.benchmarks.plots import plot
from tests.benchmarks.results import Budget, Ratio, Results, interval

_LONG = ("memory", "first", "worker", "transport", "growth", "small", "drop-in")
IN_PROCESS = [name for name in CASES if name not in _LONG]


def run(folder: Path, *words: str) -> list[dict[str, object]]:
    file = folder / "results.json"
    main([*words, "--size", "tiny", "--rounds", "1", "--saves", "1", "--dir", str(folder), "--json", str(file)])
    cases: list[dict[str, object]] = json.loads(file.read_text())["cases"]
    return cases


@pytest.mark.parametrize("case", IN_PROCESS)
def test_case(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setattr(os, "sync", lambda: None)  # of the whole machine; here nothing is measured
    [found] = run(tmp_path, case, "--peers", "torch")
    assert found["case"] == case
    assert "asyncdcp" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json"], "it cleans up after itself"


def test_what_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    state = {"w": torch.ones(4 << 20)}
    held = child.memory(OwnThread, state, tmp_path)
    assert 0.9 < held["extra"] / held["state"] < 3
    (tmp_path / "first").mkdir()
    seconds = child.first(child.Unprepared, state, tmp_path / "first")
    assert seconds["first"] > 0
    assert seconds["later"] > 0


def test_transfers_are_put_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(setting: object, receivers: int) -> transfer.Samples:
        own = (transfer.OWN, transfer.UNVERIFIED, transfer.BY_GROUP, transfer.BY_GROUP_UNVERIFIED)
        names = (*own, transfer.Torch.name, transfer.Raw.name)
        metrics = {"big": [0.5], "small": [0.1 * receivers], "lag p99": [0.001], "memory": [0.06]}
        return {name: dict(metrics) for name in names}

    monkeypatch.setattr(transport, "measured", measured)
    found = transport.run(Setting(Path(), "tiny", 1, 1, [], lambda _: None))
    assert [found.values(ratio) for ratio in found.ratios] == [[1.0]] * 14
    assert "MISSED: at most 0.2" in found.table()


def test_its_failure_is_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no-such-size"):
        child.ask("memory", OwnThread, "no-such-size", tmp_path)


def test_wrong_words_are_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for words in (["nonsense"], ["--peers", "nonsense"], ["--rounds", "0"], ["--dir", str(tmp_path / "no")]):
        with pytest.raises(SystemExit):
            arguments(words)
    said = capsys.readouterr().err
    for part in ("there are save, load", "no peer nonsense", "take 1 or more", "is not a directory"):
        assert part in said


def test_table_judges_by_the_median() -> None:
    results = Results("save", "about")
    for own, other in ((1.0, 1.0), (1.2, 1.0), (9.0, 1.0)):
        results.add("own", stall=own)
        results.add("other", stall=other)
    results.ratios = [Ratio("", "own", "stall", "other", "stall", limit) for limit in (1.25, 1.0)]
    results.budgets = [Budget("own", "stall", 1.3), Budget("own", "stall", 1.1)]
    table = results.table()
    assert table.count("reached") == table.count("MISSED") == 2
    assert "1.2 (1 to 9)" in table


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    bars, steps, curves = Results("save", "about"), Results("train", "about"), Results("growth", "about")
    bars.add("asyncdcp", stall=1.0, durable=2.0)
    steps.add("asyncdcp", lost=1.0)
    steps.series["asyncdcp"] = [(-1, 0.02), (0, 0.1), (1, 0.03)]
    curves.series = {f"save, per {per}": [(1.0, 2.0), (4.0, 2.0)] for per in ("byte", "tensor")}
    made = [path for results in (bars, steps, curves) for path in plot(results, tmp_path)]
    names = ["growth.png", "save-durable.png", "save-stall.png", "train-lost.png", "train-steps.png"]
    assert sorted(path.name for path in made) == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)


def test_interval_holds_the_median() -> None:
    values = [float(value) for value in range(1, 22)]
    low, high = interval(values)
    assert 1 < low < 11 < high < 21
