"""Inspect with samples: what a run would see, before it writes anything."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnx_lowrank
from onnx_lowrank import Inspection, UsageError
from onnx_lowrank.cli.spectra import in_order, print_inspection
from tests.helpers.commands import call, error, names, report_of
from tests.helpers.models import parse, uniform
from tests.helpers.screens import shown

SIZE, INNER = 64, 6


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights have full rank, and samples of few dimensions."""
    folder = tmp_path_factory.mktemp("inspected")
    rng = np.random.default_rng(0)
    model = parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[batch, {SIZE}] x, float[batch, 2, 5, 5] image)
        => (float[batch, 10] y, float[batch, 4, 3, 3] z) {{
            a = MatMul(x, W1)  b = Relu(a)  c = MatMul(b, W2)  d = Relu(c)  y = MatMul(d, W3)
            z = Conv(image, C)
        }}""",
        {
            "W1": uniform((SIZE, 96), rng),
            "W2": uniform((96, 80), rng),
            "W3": uniform((80, 10), rng),
            "C": uniform((4, 2, 3, 3), rng),
        },
    )
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{number}"
    onnx.save(model, folder / "model.onnx")
    mix = rng.standard_normal((INNER, SIZE))
    x = (rng.standard_normal((400, INNER)) @ mix).astype(np.float32)
    np.savez(folder / "data.npz", x=x, image=uniform((400, 2, 5, 5), rng))
    return folder


@pytest.fixture(scope="module")
def fitted(place: Path) -> Inspection:
    return onnx_lowrank.inspect(
        place / "model.onnx", data=place / "data.npz", simplify=False, shares=[0.5, 0.3]
    )


def ranks(found: Inspection) -> dict[str, int]:
    """Rank of each map at energy 0.95."""
    at = found.energies.index(0.95)
    return {row.name: row.ranks[at] for row in found.entries}


def run(place: Path, tmp_path: Path, *options: object) -> dict[str, Any]:
    source, data = place / "model.onnx", place / "data.npz"
    args = (source, tmp_path / "out.onnx", "--data", data, "--no-simplify", "--no-bench", "--force")
    return report_of(*args, *options, folder=tmp_path)


def test_ranks_are_those_that_a_run_needs(place: Path, fitted: Inspection, tmp_path: Path) -> None:
    weights = ranks(onnx_lowrank.inspect(place / "model.onnx"))
    report = run(place, tmp_path, "--energy", 0.95, "--rank-multiple", 1, "--min-gain", -1)
    needed = {layer["name"]: layer["rank"] for layer in report["layers"] if layer["rank"]}
    found = ranks(fitted)
    del needed["MatMul_4"]  # the last layer's rank is what the outputs need
    assert len(needed) == 2
    assert needed == {name: found[name] for name in needed}
    first = fitted.entries[0]
    assert (first.energy_of, first.spectrum is not None) == ("output", True)
    assert found[first.name] <= INNER < weights[first.name]
    assert first.half is not None
    assert first.half > 0.98


def test_forms_that_are_off_are_measured_by_their_weights(place: Path, fitted: Inspection) -> None:
    (conv, _) = [row for row in fitted.entries if row.ops == "conv"]
    assert conv.energy_of == "weight"
    assert "off by default" in conv.reason
    every = onnx_lowrank.inspect(
        place / "model.onnx", data=place / "data.npz", simplify=False, ops=["all"], shares=[0.9]
    )
    assert {row.energy_of for row in every.entries} == {"output"}
    assert all(not row.reason for row in every.entries)


def test_budgets_are_those_of_a_run(place: Path, fitted: Inspection, tmp_path: Path) -> None:
    assert [budget.keep for budget in fitted.budgets] == [0.5, 0.3]
    for budget in fitted.budgets:
        report = run(place, tmp_path, "--keep", budget.keep, "--effort", "quick")
        totals, goal = report["totals"], report["goal"]
        assert budget.linear_parameters == totals["linear_parameters_after"]
        assert budget.parameters == totals["parameters_after"]
        assert budget.macs == totals["macs_after"]
        # What layers gain by their fit is weighed by Fisher information: of fewer draws in quick.
        assert budget.damage == pytest.approx(goal["predicted_damage"], rel=1e-3)
        factored = [layer for layer in report["layers"] if layer["rank"]]
        assert budget.factored == len(factored)
        # But for what a pair and the record of the run add beside their elements.
        assert 0 <= report["output"]["bytes"] - budget.bytes < 3000


def test_layers_that_are_left_out_say_so(place: Path) -> None:
    found = onnx_lowrank.inspect(
        place / "model.onnx",
        data=place / "data.npz",
        simplify=False,
        shares=[0.5],
        exclude=["MatMul_2"],
    )
    rows = {row.name: row for row in found.entries}
    assert "exclude='MatMul_2'" in rows["MatMul_2"].reason
    assert (rows["MatMul_2"].energy_of, rows["MatMul_0"].energy_of) == ("weight", "output")
    # What is left out counts in no share.
    (budget,) = found.budgets
    assert budget.linear_parameters <= 0.5 * (SIZE * 96 + 80 * 10)


def test_no_budgets(place: Path, fitted: Inspection, capfd: pytest.CaptureFixture[str]) -> None:
    model, data = place / "model.onnx", place / "data.npz"
    found = onnx_lowrank.inspect(model, data=data, simplify=False, shares=[])
    assert not found.budgets
    assert ranks(found) == ranks(fitted)
    assert call("inspect", model, "--data", data, "--no-simplify", "--budgets", "") == 0
    assert "what --keep would give" not in capfd.readouterr().out


def test_a_budget_that_cannot_be_had_is_named(place: Path) -> None:
    data = place / "data.npz"
    found = onnx_lowrank.inspect(place / "model.onnx", data=data, simplify=False, shares=[0.001])
    assert not found.budgets
    assert "the least that can be kept" in found.missed[0]


def test_statistics_are_saved_and_loaded(place: Path, fitted: Inspection, tmp_path: Path) -> None:
    model, data, stats = place / "model.onnx", place / "data.npz", tmp_path / "stats.npz"
    onnx_lowrank.inspect(model, data=data, simplify=False, shares=[0.5], save_stats=stats)
    again = onnx_lowrank.inspect(model, load_stats=stats, simplify=False, shares=[0.5])
    assert ranks(again) == ranks(fitted)
    assert again.calibration is not None
    assert any("moments of" in note for note in again.notes)


def test_the_command_shows_it_and_writes_the_report(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "inspection.json"
    args = ("inspect", place / "model.onnx", "--data", place / "data.npz", "--no-simplify")
    assert call(*args, "--budgets", "0.5,0.3", "--report", report) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    written = json.loads(report.read_text())
    for row in written["entries"]:
        (line,) = [
            line
            for line in captured.out.splitlines()
            if line.split()[:2] == [row["name"], row["form"]]
        ]
        assert row["energy_of"] in line
        for rank in row["ranks"]:
            assert f"{rank} ({rank / row['break_even']:.2f})" in line
    for budget in written["budgets"]:
        assert f"{budget['bytes']:,}" in captured.out
    assert written["origin"]["command"].startswith("onnx-lowrank inspect ")
    assert names(place) == ["data.npz", "model.onnx"]
    assert call(*args, "--quiet", "--report", report) == 0
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert json.loads(report.read_text())["entries"] == written["entries"]


@pytest.mark.parametrize("width", [80, 60])
def test_it_fits_a_terminal(
    width: int, fitted: Inspection, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = shown(lambda screen: print_inspection(fitted, screen), width, monkeypatch)
    # A path is one word, which is not folded, so that it can be copied.
    assert (
        max(len(line) for line in lines if "/model.onnx" not in line and "/data" not in line)
        <= width
    )
    assert len([line for line in lines if re.search(r"\d×\d", line)]) == len(fitted.entries)
    text = " ".join(line.strip() for line in lines)
    assert "by its weight alone; off by default; --ops conv" in text.replace(
        "ops='conv'", "--ops conv"
    )


def test_the_order_of_the_rows(fitted: Inspection) -> None:
    def order(by: str) -> list[str]:
        return [row.name for row in in_order(fitted, by).entries]

    assert order("graph") == [row.name for row in fitted.entries]
    assert order("name") == sorted(order("graph"))
    sizes = [row.parameters for row in in_order(fitted, "parameters").entries]
    assert sizes == sorted(sizes, reverse=True)
    shares = [row.ranks[2] / (row.break_even or 1) for row in in_order(fitted, "rank").entries]
    assert shares == sorted(shares)
    halves = [row.half or 0.0 for row in in_order(fitted, "energy").entries]
    assert halves == sorted(halves, reverse=True)


def test_wrong_usage(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = place / "model.onnx"
    assert call("inspect", model, "--budgets", "0.5") == 2
    assert "--budgets needs --data or --calibrate or --load-stats" in error(capfd)
    assert call("inspect", model, "--sort", "size") == 2
    assert "--sort: expected one of graph, name, parameters, rank, energy" in error(capfd)
    assert call("inspect", model, "--data", place / "nowhere.npz") == 1
    assert "no such file" in error(capfd)
    with pytest.raises(UsageError, match="expected a number above 0 and up to 1, got 50"):
        onnx_lowrank.inspect(model, data=place / "data.npz", shares=[50])
