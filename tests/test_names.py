from __future__ import annotations

import pytest

from asyncdcp.names import belongs_to, data_name, index_name, make_save_id, record_name, record_save_id
from asyncdcp.storage import check_name


def test_a_save_id_depends_on_run_path_and_attempt() -> None:
    ids = {
        make_save_id(run, path, attempt) for run in ("a", "b") for path in ("p", "q\udcff", "ä") for attempt in (1, 11)
    }
    assert len(ids) == 12 and all(record_save_id(record_name(each)) == each for each in ids)
    assert make_save_id("a", "p", 1) == make_save_id("a", "p", 1)


def test_names_are_told_apart() -> None:
    one, two = make_save_id("r", "p", 1), make_save_id("r", "p", 2)
    names = [record_name(one), index_name(one, 12), data_name(one, 12, 3), data_name(one, 1, 0, "bin")]
    assert len(set(map(check_name, names))) == 4
    assert all(belongs_to(name, one) and not belongs_to(name, two) for name in names)
    assert [record_save_id(name) for name in names] == [one, None, None, None]


@pytest.mark.parametrize(
    "name", ["", "x.json", "0" * 19 + ".json", "0" * 21 + ".json", "A" * 20 + ".json", "0" * 20 + ".json\n"]
)
def test_what_is_no_record(name: str) -> None:
    assert record_save_id(name) is None
