"""The public verbs side by side: the same words for the same things, in the same order, wherever they stand."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncdcp import (
    AESGCM,
    AsyncCheckpointer,
    CheckpointFuture,
    CheckpointManager,
    Options,
    Published,
    SyncCheckpointer,
    Telemetry,
    follow,
)
from asyncdcp.errors import InvalidOption
from asyncdcp.interop.convert import Changes

LOADS: list[Callable[..., Any]] = [
    SyncCheckpointer.load,
    CheckpointManager.load,
    CheckpointManager.restore,
    CheckpointManager.restore_latest,
    Published.load,
]

OTHERS: dict[str, Any] = {
    "strict": False,
    "cast": "allow",
    "keys": ["weight"],
    "rename": {"a": "b"},
    "device": "cpu:0",
    "assign": True,
    "allow_pickle": True,
    "per_rank": "drop",
    "replicas": "broadcast",
    "on_progress": print,
}
"""For every option of a load another value than the default."""


def words(verb: Callable[..., Any], *without: str) -> list[tuple[str, object, object]]:
    """The options of a verb: names, types and defaults, in their order."""
    parameters = inspect.signature(verb).parameters.values()
    assert not [each for each in parameters if each.kind in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    options = [each for each in parameters if each.kind is each.KEYWORD_ONLY and each.name not in without]
    return [(each.name, each.annotation, each.default) for each in options]


@pytest.mark.parametrize("verb", LOADS, ids=lambda verb: verb.__qualname__)
def test_every_load_has_the_same_options(verb: Callable[..., Any]) -> None:
    """Whoever follows a run loads by itself, so that nobody has replicas."""
    without = ("replicas",) if verb is Published.load else ()
    assert words(verb) == words(AsyncCheckpointer.load, *without)


def test_every_save_has_the_same_options() -> None:
    assert words(SyncCheckpointer.save) == words(AsyncCheckpointer.save)
    assert words(CheckpointManager.save, "metrics") == words(AsyncCheckpointer.save, "overwrite")


def test_all_are_made_with_the_same_options() -> None:
    own = words(AsyncCheckpointer)
    assert words(SyncCheckpointer) == own
    assert [word for word in words(CheckpointManager) if word in own] == own
    assert words(follow)[-2:] == own[-2:]


async def test_each_load_hands_all_of_them_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, given = AsyncCheckpointer.load, list[dict[str, Any]]()

    def noted(self: AsyncCheckpointer, path: Any, state: Any, **options: Any) -> CheckpointFuture[Any]:
        given.append(options)
        return load(self, path, state)

    monkeypatch.setattr(AsyncCheckpointer, "load", noted)
    assert list(OTHERS) == [name for name, _, _ in words(load)]
    state = {"weight": torch.zeros(2)}
    async with CheckpointManager(tmp_path, process=False) as manager:
        await manager.save(1, {"weight": torch.ones(2)})
        for verb in (partial(manager.load, 1), partial(manager.restore, 1), manager.restore_latest):
            await verb(state, **OTHERS)
    assert given == [OTHERS] * 3
    alone = {name: value for name, value in OTHERS.items() if name != "replicas"}
    async with aclosing(follow(tmp_path)) as run:
        await (await anext(run)).load(state, **alone)
    assert given[3] == {**alone, "replicas": "read"}


WRONG: list[tuple[str, Any]] = [
    ("device", "gpu"),
    ("device", 1.5),
    ("device", "meta"),
    ("keys", "a"),
    ("keys", ["a", 1]),
    ("keys", []),
    ("keys", (name for name in "ab")),  # which could be looked at only once
    ("keys", 3),
    ("rename", {"a": 1}),
    ("rename", 3),
    ("on_progress", "print"),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_an_option_that_means_nothing_is_refused_by_name(name: str, value: Any) -> None:
    with SyncCheckpointer(process=False) as checkpointer:
        with pytest.raises(InvalidOption, match=f"^{name} takes a "):
            checkpointer.load("nowhere", **{name: value})
        if name in ("keys", "on_progress"):
            with pytest.raises(InvalidOption, match=f"^{name} takes a "):
                checkpointer.save("nowhere", {"a": 1}, **{name: value})


def test_a_rename_that_gives_no_name_is_told(tmp_path: Path) -> None:
    with SyncCheckpointer(process=False) as checkpointer:
        checkpointer.save(tmp_path / "it", {"a": 1})
        with pytest.raises(InvalidOption, match=r"rename makes None of .*, and that is no name"):
            checkpointer.load(tmp_path / "it", {"a": 2}, rename=lambda name: None)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(("name", "value"), [("options", {}), ("process_group", 3), ("telemetry", print)])
def test_so_are_those_of_a_constructor(name: str, value: Any) -> None:
    makes: list[Any] = [partial(CheckpointManager, "run")]
    if name != "telemetry":
        makes += [AsyncCheckpointer, SyncCheckpointer]
    for make in makes:
        with pytest.raises(InvalidOption, match=f"^{name} takes a"):
            make(**{name: value}, process=False)


def test_options_are_given_by_name() -> None:
    for kind in (Options, Telemetry, Changes):
        with pytest.raises(TypeError, match="positional"):
            kind(None)  # type: ignore[call-arg]


FLAGS: dict[str, list[Callable[..., object]]] = {
    "process": [AsyncCheckpointer, SyncCheckpointer, partial(CheckpointManager, "run")],
    "read_only": [partial(CheckpointManager, "run")],
    "hide_metadata": [partial(AESGCM, bytes(32))],
    "traces": [Telemetry],
}
VERB_FLAGS = {"save": ["overwrite", "allow_pickle"], "load": ["strict", "assign", "allow_pickle"]}


def test_a_flag_is_true_or_false() -> None:
    """And not "no", which would count as true."""
    for name, made_by in FLAGS.items():
        for make in made_by:
            with pytest.raises(InvalidOption, match=f"{name} takes True or False, not 'no'"):
                make(**{name: "no"})
    with pytest.raises(InvalidOption, match="allow_pickle takes True or False"):
        Changes(allow_pickle="no")  # type: ignore[arg-type]
    with SyncCheckpointer(process=False) as checkpointer:
        for verb, names in VERB_FLAGS.items():
            for name in names:
                with pytest.raises(InvalidOption, match=f"{name} takes True or False, not 1"):
                    getattr(checkpointer, verb)("nowhere", {}, **{name: 1})
