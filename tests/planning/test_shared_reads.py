"""Who reads what: what several ranks want alike is read once, by one of them, and the reading is divided evenly."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from asyncdcp.boxes import Box
from asyncdcp.format.blocks import SLAB_BYTES
from asyncdcp.planning.load_plan import ReadItem
from asyncdcp.planning.shared_reads import Wanted, cut, share_reads

MIB = 1 << 20


def item(file: str, begin: int, end: int) -> ReadItem:
    return ReadItem(0, file, begin, end, Box((), ()), 0, -1)


@st.composite
def plans(draw: st.DrawFn) -> list[list[tuple[str, int, int]]]:
    spans = st.tuples(st.sampled_from("ab"), st.integers(0, 40), st.integers(1, 30))
    pool = draw(st.lists(spans.map(lambda span: (span[0], span[1] * 16, span[1] * 16 + span[2] * MIB)), min_size=1))
    own = st.lists(st.sampled_from(pool), max_size=8)  # some of them twice
    return draw(st.lists(own, min_size=1, max_size=6))


@given(plans())
def test_what_several_want_is_read_once_and_nothing_else_is_shared(told: list[list[tuple[str, int, int]]]) -> None:
    shared = share_reads([Wanted.of([item(*span) for span in spans]) for spans in told])
    wanted_by = {span: [rank for rank, spans in enumerate(told) if span in spans] for spans in told for span in spans}
    expected = Counter(
        (file, begin, end, *ranks)
        for (file, first, last), ranks in wanted_by.items()
        if len(ranks) > 1
        for _, begin, end in cut((0, first, last), shared.unit_bytes)
    )
    found = Counter(
        (shared.files[file], begin, end, *shared.groups[unit.group])
        for unit in shared.units
        for file, begin, end in unit.pieces
    )
    assert found == expected
    for unit in shared.units:
        assert unit.reader in shared.groups[unit.group]
        assert 0 < unit.nbytes <= shared.unit_bytes <= SLAB_BYTES


def test_the_reading_is_divided_evenly() -> None:
    sizes = [150 * MIB, *[9 * MIB] * 24, *[3072] * 50]  # as in a small language model
    begins = [sum(sizes[:number]) for number in range(len(sizes))]
    told = Wanted.of([item("data", begin, begin + size) for begin, size in zip(begins, sizes, strict=True)])
    for ranks in (2, 8, 64):
        shared = share_reads([told] * ranks)
        loads = Counter[int]()
        for unit in shared.units:
            loads[unit.reader] += unit.nbytes
        assert sum(loads.values()) == sum(sizes)
        assert max(loads.values()) <= 1.2 * sum(sizes) / ranks + MIB


def test_groups_take_turns() -> None:
    told = [Wanted.of([item(name, 0, 4 * MIB) for name in names]) for names in ("a", "a", "b", "b")]
    groups = [unit.group for unit in share_reads(told).units]
    assert groups == [0, 1] * 4
