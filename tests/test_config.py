"""Options are checked when they are made, and the message names the option."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from asyncdcp import Options
from asyncdcp.errors import InvalidOption

DEADLINES = ("save_deadline", "load_deadline", "close_deadline", "settle_seconds")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("staging_bytes", value) for value in (0, -1, 1.5, True, "1 GiB")),
        *(("when_busy", value) for value in ("wait", None, True)),
        *(("on_error", value) for value in ("ignore", None, 0)),
        *((name, value) for name in DEADLINES for value in (0, -1, float("nan"), True, "10", None)),
    ],
)
def test_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidOption, match=f"^{name} takes"):
        Options(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("staging_bytes", value) for value in (None, 1, 1 << 40)),
        *(("when_busy", value) for value in ("queue", "skip", "error")),
        *(("on_error", value) for value in ("raise", "warn", print)),
        *((name, value) for name in DEADLINES for value in (1, 0.001, float("inf"))),
    ],
)
def test_accepted(name: str, value: Any) -> None:
    assert getattr(Options(**{name: value}), name) == value


def test_frozen_compared_and_with_defaults_for_all() -> None:
    options = Options()
    assert options == Options()
    with pytest.raises(FrozenInstanceError):
        options.save_deadline = 1  # type: ignore[misc]  # on purpose
    assert all(field.default is not field.default_factory for field in fields(Options))
