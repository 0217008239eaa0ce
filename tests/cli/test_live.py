"""Stages on a terminal and in a pipe, and a run that prints nothing."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_lowrank.cli.live import LineProgress, Route, seconds_between, time_text
from onnx_lowrank.cli.options import terminal_progress
from onnx_lowrank.compression.settings import Settings
from onnx_lowrank.compression.stages import stages_of
from onnx_lowrank.progress import Silent, Stages
from tests.helpers.commands import QUICK, M, call, error, litter, names, one_line
from tests.helpers.models import uniform
from tests.helpers.terminals import in_terminal

CURSOR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def test_a_route_counts_what_was_planned() -> None:
    route = Route()
    assert route.place("load") == "load"
    route.plan(("load", "measure", "write"))
    places = [route.place(name) for name in ("load", "find", "write", "measure")]
    assert places == ["1/3 load", "1/3 find", "3/3 write", "2/3 measure"]
    route.plan(("bench",), "point 2 of 7")
    assert route.place("fit") == "point 2 of 7, fit"
    assert route.place("bench") == "point 2 of 7, 1/1 bench"


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0 s"), (99, "99 s"), (720, "12 min")])
def test_times(seconds: float, text: str) -> None:
    assert time_text(seconds) == text


def test_the_seconds_between_two_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, seconds in (("5", 5.0), ("0", 0.0), ("-1", 0.0), ("often", 20.0)):
        monkeypatch.setenv("ONNX_LOWRANK_PROGRESS", value)
        assert seconds_between() == seconds
    monkeypatch.delenv("ONNX_LOWRANK_PROGRESS")
    assert seconds_between() == 20.0
    assert isinstance(terminal_progress(), LineProgress)  # standard error is no terminal here
    assert isinstance(terminal_progress(quiet=True), Silent)


def test_long_work_in_a_pipe_says_how_far_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    stages = Stages(LineProgress(every=0.001))
    stages.plan(("load", "measure"))
    line = re.compile(
        r"^onnx-lowrank: 2/2 measure: 50 %, \d+ s(, about \d+ s left)?, layer\\x1b 3; "
        r"\d+ s in all$",
        re.MULTILINE,
    )
    written = ""
    with stages("measure", 10) as advance:
        advance(5)
        stages.detail("layer\x1b 3")
        while not line.search(written):  # it waits for the writer, however slow that is
            written += capfd.readouterr().err
    assert not [thread for thread in threading.enumerate() if thread.name.endswith("(_watch)")]


def test_short_work_in_a_pipe_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    stages = Stages(LineProgress(every=1000))
    with stages("load"), stages("inner", 2) as advance:
        advance(2)
    assert capfd.readouterr().err == ""


def test_the_plan_of_a_run_names_its_stages(source: Path) -> None:
    class Noting(Silent):
        def __init__(self) -> None:
            self.planned: tuple[str, ...] = ()

        def plan(self, names: Sequence[str], part: str = "") -> None:
            self.planned = tuple(names)

    from onnx_lowrank import compress

    x = uniform([24, M], np.random.default_rng(1))
    quick: dict[str, Any] = {"simplify": False, "samples": 2, "effort": "quick"}
    keep = {"keep": 0.5, "data": {"x": x}}
    for options in ({"energy": 0.9}, keep, {"rank": 4, "weights": "8"}):
        noting = Noting()
        report = compress(source, progress=noting, **quick, **options).report
        assert noting.planned == stages_of(Settings.of({**quick, **options}))
        # What is planned comes, in that order; what else comes is a part of it.
        came = [name for name in report.seconds if name in noting.planned]
        assert came == list(noting.planned)


def test_stages_on_a_terminal_leave_no_trace(source: Path) -> None:
    out = source.with_name("out.onnx")
    code, text = in_terminal(source, out, *QUICK)
    assert code == 0
    assert re.search(r"\d+/\d+ measure", text)
    assert "left" in text
    # The cursor is shown again, and from the first result on nothing is erased.
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    results = text[text.index("linear map") :]
    assert "\x1b[2K" not in results
    assert f"wrote {out}" in results.replace("\n", "").replace("  ", " ") or "wrote" in results


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"NO_COLOR": "1"}])
def test_terminals_without_colours(environment: dict[str, str], source: Path) -> None:
    code, text = in_terminal("inspect", source, environment=environment)
    assert code == 0
    assert not re.search(r"\x1b\[(3|9)\d", text)
    if "TERM" in environment:
        assert not CURSOR.search(text)


def test_columns_are_followed(two: Path) -> None:
    out = two.with_name("out.onnx")
    for args, width, environment in (
        ((two, out, "--rank", 8, *QUICK), 60, {}),
        (("inspect", two), 120, {"COLUMNS": "50"}),
    ):
        code, text = in_terminal(*args, width=width, environment={"TERM": "dumb", **environment})
        assert code == 0
        narrow = min(width, int(environment.get("COLUMNS", width)))
        for line in text.splitlines():
            assert len(line) <= narrow or len(line.split()) == 1 or str(two.parent) in line


def test_an_interrupt_leaves_nothing(source: Path) -> None:
    feeds = source.with_name("feeds.py")
    feeds.write_text(
        "import signal\ndef feeds():\n    signal.raise_signal(signal.SIGINT)\n    yield {}\n"
    )
    before = names(source.parent)
    code, text = in_terminal(
        source, source.with_name("out.onnx"), "--calibrate", f"{feeds}:feeds", *QUICK
    )
    assert code == 130
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    last = CURSOR.sub("", text).strip().splitlines()[-1]
    assert last == "onnx-lowrank: error: interrupted; nothing written"
    assert [name for name in names(source.parent) if name != "__pycache__"] == before
    assert not litter(source.parent)


@pytest.mark.parametrize("verb", ["compress", "check", "bench", "inspect", "support", "sweep"])
def test_quiet(verb: str, source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report, curve = source.with_name("report.json"), source.with_name("curve")
    args: dict[str, tuple[object, ...]] = {
        "compress": (source, source.with_name("out.onnx"), *QUICK),
        "check": ("check", source, source),
        "bench": ("bench", source, "--iterations", 1, "--warmup", 0),
        "inspect": ("inspect", source),
        "support": ("support", source),
        "sweep": ("sweep", source, "--budgets", 0.5, "--out", curve, *QUICK),
    }
    wanted = [] if verb == "sweep" else ["--report", report]
    assert call(*args[verb], "-q", *wanted) == 0
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert (curve / "sweep.json" if verb == "sweep" else report).stat().st_size


def test_errors_are_told_all_the_same(source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = source.with_name("out.onnx")
    assert call(source, out, "--quiet", "--rank", 4, "--max-error", 1e-9, *QUICK) == 3
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "--max-error" in one_line(captured.err)
    assert call(source, out, "--quiet", "--verbose") == 2
    assert "--quiet and --verbose exclude each other" in error(capfd)
    assert names(source.parent) == ["in.onnx"]
