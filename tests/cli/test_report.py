"""The page of a report: its geometry, what is on it of any run, and how it looks in a real browser."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncdcp.cli.report.charts import Point, Rectangle, Series, line_chart, rounded, squarified, ticks
from asyncdcp.cli.text import number_text
from asyncdcp.runs import Saved
from asyncdcp.runs.history import StageTime, stage_times
from asyncdcp.trace import Span
from tests.cli.conftest import Call
from tests.pipeline.forge import steady

_BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-headless-shell", "google-chrome", "chrome"))), None
)


# ── geometry ────────────────────────────────────────────────────────────────────────────────────────────────────────


@steady
@given(st.lists(st.floats(1, 1e9), min_size=1, max_size=40), st.floats(1, 2000), st.floats(1, 2000))
def test_rectangles_fill_the_area_in_proportion(sizes: list[float], width: float, height: float) -> None:
    sizes.sort(reverse=True)
    found = squarified(sizes, Rectangle(0, 0, width, height))
    whole, total = width * height, sum(sizes)
    for size, each in zip(sizes, found, strict=True):
        assert each.width * each.height == pytest.approx(size / total * whole, rel=1e-6, abs=whole * 1e-9)
        assert each.x >= -1e-6 and each.x + each.width <= width * (1 + 1e-6)
        assert each.y >= -1e-6 and each.y + each.height <= height * (1 + 1e-6)
    for n, a in enumerate(found):
        for b in found[n + 1 :]:
            across = min(a.x + a.width, b.x + b.width) - max(a.x, b.x)
            down = min(a.y + a.height, b.y + b.height) - max(a.y, b.y)
            assert across <= width * 1e-6 or down <= height * 1e-6, "two of them overlap"


def test_equal_sizes_come_out_near_squares() -> None:
    found = squarified([1.0] * 12, Rectangle(0, 0, 400, 300))
    assert max(max(r.width / r.height, r.height / r.width) for r in found) < 1.5


@steady
@given(st.floats(-1e12, 1e12), st.floats(1e-6, 1e12))
def test_ticks_are_round_few_and_within(low: float, extent: float) -> None:
    if abs(low) > extent * 1e6:
        return
    high = low + extent
    a, b = rounded(low, high, 4)
    assert a <= low + extent * 1e-6 and b >= high - extent * 1e-6
    found = ticks(a, b, 4)
    assert 2 <= len(found) <= 8 and found == sorted(found)
    assert all(a - extent * 1e-6 <= value <= b + extent * 1e-6 for value in found)


@pytest.mark.parametrize("values", [[0.0], [5.0], [5.0, 5.0], [-3.0, -3.0], [1e-12, 2e-12], [1e300, -1e300]])
@pytest.mark.parametrize("from_zero", [False, True])
def test_a_chart_of_any_values_has_finite_coordinates(values: list[float], from_zero: bool) -> None:
    if from_zero and min(values) < 0:
        return
    points = [Point(10 * n, value, "tip") for n, value in enumerate(values)]
    svg = line_chart("x", [Series("x", "one", points)], number_text, from_zero=from_zero)
    numbers = [float(text) for text in re.findall(r'(?:cx|cy|y1|y2)="([^"]+)"', svg)]
    assert numbers and all(math.isfinite(number) and -1 <= number <= 541 for number in numbers)


def test_stage_times() -> None:
    spans = [Span("write", 11.0, 12.0, 5), Span("stage", 10.0, 10.5, 5), Span("write", 10.5, 11.5, 6)]
    assert stage_times(spans) == {"stage": StageTime(0.0, 0.5, 5), "write": StageTime(0.5, 2.0, 11)}
    assert stage_times([]) == {}


# ── the page ────────────────────────────────────────────────────────────────────────────────────────────────────────

NAUGHTY = "<script>alert('x')</script>&\"\x1b"


def saves(count: int, metric: str = "loss") -> list[Saved]:
    return [
        Saved(
            step=10 * n,
            term=0,
            save_id="0" * 20,
            time=1.7e9 + n,
            tensor_bytes=10**6,
            stored_bytes=10**6,
            called_seconds=0.002,
            staged_seconds=0.02 + 0.001 * n,
            durable_seconds=0.2,
            stages={"stage": StageTime(0, 0.02, 10**6), "write": StageTime(0.01, 0.1, 10**6), "new": StageTime(0, 1)},
            metrics={metric: 1 / n, "none": None, "nan": math.nan},
        )
        for n in range(1, count + 1)
    ]


def write_history(run: Path, found: list[Saved]) -> None:
    (run / "history.jsonl").write_bytes(b"".join(msgspec.json.encode(saved) + b"\n" for saved in found))


class Parsed(HTMLParser):
    """Sees that what is opened is closed, and collects attributes that could load something."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tips: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.links += [values[name] for name in ("src", "href", "action", "data", "xlink:href") if name in values]
        self.tips += [values["data-tip"]] if "data-tip" in values else []
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page(call: Call, run: Path) -> tuple[str, Parsed]:
    ran = call("report", run, "-o", run.parent / "page.html")
    assert ran.status == 0, ran.err
    html = (run.parent / "page.html").read_text()
    assert [path.name for path in run.parent.glob("page*")] == ["page.html"]
    return html, Parsed(html)


def test_a_whole_page_loads_nothing(call: Call, run: Path) -> None:
    write_history(run, saves(3))
    html, parsed = page(call, run)
    assert parsed.links == ["data:,"]
    assert "://" not in html.replace(str(run), "") and "@import" not in html and "url(" not in html
    for text in ("Latest step", "Stall", "Throughput", "What each save did when", "Sizes", "committed", "latest"):
        assert text in html
    assert any("model.embed.weight: 2.56 kB, float32 [40, 16]" in tip for tip in parsed.tips)
    assert any("step 30 · write: 90 ms, from 10 ms, 1.00 MB, 11.1 MB/s" in tip for tip in parsed.tips)


def test_a_run_without_history(call: Call, run: Path) -> None:
    html, parsed = page(call, run)
    assert "no history.jsonl" in html and "What each save did when" not in html
    assert any("model.head.bias" in tip for tip in parsed.tips)


def test_a_run_whose_latest_cannot_be_opened(call: Call, run: Path) -> None:
    for path in run.rglob("*.index.json"):
        path.write_bytes(b"x" * path.stat().st_size)
    ran = call("report", run, "-o", run.parent / "page.html")
    assert ran.status == 0 and ran.err.startswith("asyncdcp: no sizes of step 20: ")
    assert "no whole checkpoint whose tensors" in (run.parent / "page.html").read_text()


def test_names_are_text_and_no_markup(call: Call, run: Path) -> None:
    write_history(run, saves(2, metric=NAUGHTY))
    html, _ = page(call, run)
    assert "<script>alert" not in html and "&lt;script&gt;alert" in html and "\x1b" not in html


def test_the_report_to_the_standard_output(call: Call, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    before = sorted(run.parent.iterdir())
    out = call("report", run, "-o", "-").out
    assert out.startswith("<!doctype html>") and out.rstrip().endswith("</html>")
    assert sorted(run.parent.iterdir()) == before


def test_the_report_of_no_run_writes_nothing(call: Call, tmp_path: Path) -> None:
    assert "holds no run" in call("report", tmp_path, "-o", tmp_path / "page.html").error
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(call: Call, run: Path, tmp_path: Path) -> None:
    assert "there is no folder" in call("report", run, "-o", tmp_path / "no" / "page.html").error


# ── in a browser ────────────────────────────────────────────────────────────────────────────────────────────────────

_PROBE = """
<script>
let failed = null;
addEventListener("error", event => failed = event.message);
addEventListener("load", () => {
  const bar = document.querySelector(".bar.write"), box = bar.getBoundingClientRect();
  bar.dispatchEvent(new PointerEvent("pointermove", {clientX: box.x, clientY: box.y, bubbles: true}));
  parent.postMessage({
    failed,
    width: innerWidth,
    tip: getComputedStyle(tip).visibility + " " + tip.textContent,
    overflow: document.documentElement.scrollWidth - innerWidth,
    flat: [...document.querySelectorAll("svg")].filter(svg => svg.getBoundingClientRect().height < 60).length,
  }, "*");
  document.dispatchEvent(new PointerEvent("pointermove"));
});
</script>
"""
_FRAMES = """
<body style="margin: 0"><script>
const found = [];
addEventListener("message", event => {
  found.push(event.data);
  document.body.dataset.found = JSON.stringify(found);
});
</script>
<iframe src="probed.html" style="width: 1280px; height: 3400px; border: 0"></iframe>
<iframe src="probed.html" style="width: 600px; height: 900px; border: 0"></iframe>
"""


@pytest.mark.skipif(_BROWSER is None, reason="no Chromium is installed")
def test_in_a_browser(call: Call, run: Path, tmp_path: Path) -> None:
    """Wide and narrow it is laid out, nothing sticks out at the side, and what is under the pointer is told.

    The picture that it leaves in the test's folder is there to be looked at.
    """
    write_history(run, saves(30))
    page(call, run)
    html = (tmp_path / "page.html").read_text()
    (tmp_path / "probed.html").write_text(html.replace("</body>", f"{_PROBE}</body>"))
    (tmp_path / "frames.html").write_text(_FRAMES)
    dom = browse(tmp_path, tmp_path / "frames.html")
    match = re.search(r'data-found="([^"]*)"', dom)
    assert match is not None, dom
    found = json.loads(unescape(match[1]))
    assert sorted(each["width"] for each in found) == [600, 1280]
    for each in found:
        assert each["failed"] is None
        assert each["tip"].startswith("visible step 300 · write: 90 ms")
        assert each["overflow"] <= 0 and each["flat"] == 0
    picture = (tmp_path / "report.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 50_000


def browse(folder: Path, file: Path) -> str:
    """The page's DOM once it has settled, and its picture in ``report.png``."""
    assert _BROWSER is not None
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/browser"]
    wanted = [
        "--window-size=1300,3400",
        "--virtual-time-budget=5000",
        "--dump-dom",
        f"--screenshot={folder}/report.png",
    ]
    ran = subprocess.run(
        [_BROWSER, *quiet, *wanted, f"--screenshot={folder}/report.png", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout
