"""Recipes: the same bytes again, a rank changed by hand, and what does not fit is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lowrank import UsageError, compress
from onnx_lowrank.graph.provenance import read_metadata
from tests.helpers.commands import call, error, report_of
from tests.helpers.models import assert_same, factored, uniform
from tests.helpers.recipes import D, fill, of_rank_9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("recipes"))


def again(folder: Path, place: Path, *, data: bool, options: dict[str, Any]) -> None:
    """A run and what its recipe makes, by file, by metadata and in memory: all the same bytes."""
    given: dict[str, Any] = {"data": folder / "data.npz"} if data else {}
    common: dict[str, Any] = {"simplify": options.pop("simplify", False), "bench": False}
    first = compress(folder / "in.onnx", **given, **common, **options, save_recipe=place / "1.json")
    first.save(place / "1.onnx")
    for recipe in (place / "1.json", place / "1.onnx", first.recipe):
        # Neither a check nor other threads have a part in it.
        more: dict[str, Any] = {"threads": 2, "bench": False, "check": recipe is not first.recipe}
        found = compress(
            folder / "in.onnx", recipe=recipe, **given, **more, save_recipe=place / "2.json"
        )
        found.save(place / "2.onnx", force=True)
        assert (place / "2.onnx").read_bytes() == (place / "1.onnx").read_bytes()
        assert [layer.rank for layer in found.report.layers] == [
            layer.rank for layer in first.report.layers
        ]
    assert any(layer.rank for layer in first.report.layers)
    assert found.recipe == first.recipe


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (False, {"energy": 0.8}),
        (False, {"energy": 0.8, "rank_multiple": 5}),
        (False, {"rank": 7}),
        (False, {"keep": 0.6, "uniform": True}),
        (False, {"keep": 0.6}),
        (True, {"energy": 0.95}),
        (True, {"keep": 0.5}),
        (True, {"keep": 0.5, "calibrate": False, "seed": 3}),
        (True, {"keep": 0.5, "fisher": True, "refit": True, "heal": 4, "calibration_samples": 30}),
        (True, {"tolerance": 0.05, "objective": "size", "metric": "cosine", "samples": 8}),
        (True, {"max_size": "24KB", "exclude": ("k",)}),
        (True, {"keep": 0.15, "weights": "8"}),
        (True, {"keep": 0.12, "weights": "auto"}),
        (True, {"keep": 0.2, "weights": "auto", "activations": "int8"}),
        (True, {"keep": 0.17, "weights": "fp32,4", "effort": "quick"}),
        (True, {"keep": 0.4, "effort": "thorough", "calibration_samples": 40}),
        (False, {"energy": 0.8, "shape_for": "qnn", "dims": {"batch": 2}}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_recipe_makes_the_same_bytes(
    data: bool, options: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    again(folder, tmp_path, data=data, options=dict(options))


def test_another_process_with_other_threads_makes_the_same_bytes(
    folder: Path, tmp_path: Path
) -> None:
    arguments = ["--data", str(folder / "data.npz"), "--no-bench", "--no-check"]
    for number, options in enumerate(
        [
            ["--keep", "0.5", "--refit", "--no-simplify", "--save-recipe", "recipe.json"],
            ["--recipe", "recipe.json", "--threads", "3"],
        ]
    ):
        # Numbers of threads that any machine can start.
        threads = str(1 + number)
        limits = {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        check = ["--threads", "1"] if not number else []
        subprocess.run(
            [sys.executable, "-m", "onnx_lowrank", str(folder / "in.onnx"), f"{number}.onnx"]
            + [a for a in [*arguments, *options, *check] if a != "--no-check"],
            check=True,
            cwd=tmp_path,
            env={**os.environ, **limits},
            capture_output=True,
        )
    assert (tmp_path / "0.onnx").read_bytes() == (tmp_path / "1.onnx").read_bytes()


def test_layers_that_share_their_first_factor_do_so_again(folder: Path, tmp_path: Path) -> None:
    first = compress(
        folder / "in.onnx",
        data=folder / "data.npz",
        keep=0.5,
        include=("q", "k", "v"),
        simplify=False,
        bench=False,
        save_recipe=tmp_path / "r.json",
    )
    assert first.recipe.shared
    plain = json.loads((tmp_path / "r.json").read_text())
    assert [set(own) for own in plain["shared"]] == [{"layers", "scales"}]
    again(
        folder,
        tmp_path,
        data=True,
        options={"keep": 0.5, "include": ("q", "k", "v")},
    )


@pytest.fixture
def recipe(folder: Path, tmp_path: Path) -> Path:
    return of_rank_9(folder, tmp_path / "r.json")


def test_the_recipe_decides_alone(folder: Path, recipe: Path) -> None:
    options: dict[str, Any]
    for options in (
        {"refit": True, "data": folder / "data.npz"},
        {"min_gain": 0.2},
        {"exclude": ("q",)},
        {"rank_multiple": 4},
    ):
        with pytest.raises(UsageError, match="exclude each other"):
            compress(folder / "in.onnx", recipe=recipe, **options)
    with pytest.raises(UsageError, match="one goal"):
        compress(folder / "in.onnx", recipe=recipe, keep=0.5)


def test_a_recipe_of_samples_asks_for_them(folder: Path, tmp_path: Path) -> None:
    data = folder / "data.npz"
    first = compress(
        folder / "in.onnx", data=data, rank=9, simplify=False, bench=False, effort="quick",
        save_stats=tmp_path / "s.npz",
    )  # fmt: skip
    with pytest.raises(UsageError, match="samples to fit to"):
        compress(folder / "in.onnx", recipe=first.recipe)
    again = compress(
        folder / "in.onnx", recipe=first.recipe, load_stats=tmp_path / "s.npz", bench=False
    )
    first.save(tmp_path / "1.onnx")
    again.save(tmp_path / "2.onnx")
    assert (tmp_path / "1.onnx").read_bytes() == (tmp_path / "2.onnx").read_bytes()
    plain = factored(folder / "in.onnx", rank=9).recipe
    with pytest.raises(UsageError, match="to the weights alone"):
        compress(folder / "in.onnx", recipe=plain, calibration=data)


def test_a_run_that_had_nothing_to_fit_is_made_again_by_the_same_options(
    folder: Path, tmp_path: Path
) -> None:
    """Every rank is too large to gain anything; then samples have no part in the model."""
    options: dict[str, Any] = {
        "calibration": folder / "data.npz", "simplify": False, "bench": False,
    }  # fmt: skip
    first = compress(folder / "in.onnx", rank=64, refit=True, **options)
    assert first.report.calibration is None
    assert not any(layer.rank for layer in first.report.layers)
    del options["simplify"]
    again = compress(folder / "in.onnx", recipe=first.recipe, **options)
    first.save(tmp_path / "1.onnx")
    again.save(tmp_path / "2.onnx")
    assert (tmp_path / "1.onnx").read_bytes() == (tmp_path / "2.onnx").read_bytes()
    assert again.recipe == first.recipe


def test_a_dry_run_writes_the_recipe(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    planned = factored(folder / "in.onnx", energy=0.8, dry_run=True, save_recipe=path)
    done = factored(folder / "in.onnx", energy=0.8)
    assert planned.recipe == done.recipe
    once = compress(folder / "in.onnx", recipe=path, check=False, bench=False)
    assert once.recipe == done.recipe


def test_what_a_timing_decided_is_said(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    options: dict[str, Any] = {"simplify": False, "samples": 2, "rank_multiple": "auto"}
    result = compress(folder / "in.onnx", keep=0.8, **options)
    (note,) = [note for note in result.report.notes if note.startswith("timing decided")]
    assert "rank_multiple='auto'" in note
    assert "save_recipe" in note
    result = compress(folder / "in.onnx", keep=0.8, save_recipe=path, **options)
    (note,) = [note for note in result.report.notes if note.startswith("timing decided")]
    assert f"recipe='{path}' makes this result again" in note
    result = compress(folder / "in.onnx", recipe=path, samples=2)
    assert not any(note.startswith("timing decided") for note in result.report.notes)


def test_the_model_says_how_it_was_made(folder: Path, tmp_path: Path) -> None:
    model = onnx.load(folder / "in.onnx")
    model.metadata_props.add(key="author", value="somebody")
    onnx.save(model, tmp_path / "in.onnx")
    data = folder / "data.npz"
    options = {"data": data, "keep": 0.5, "bench": False, "simplify": False, "seed": 2}
    first = compress(tmp_path / "in.onnx", **options)  # type: ignore[arg-type]
    first.save(tmp_path / "1.onnx")
    found = onnx.load(tmp_path / "1.onnx")
    assert found.metadata_props[0].key == "author"
    own = read_metadata({p.key: p.value for p in found.metadata_props})
    assert own["tool"].startswith("onnx-lowrank ")
    assert own["input"].startswith("sha256:")
    assert json.loads(own["goal"]) == {"keep": 0.5}
    assert json.loads(own["settings"]) == {"seed": 2, "simplify": False}
    text = "".join(own.values())
    assert str(tmp_path) not in text
    assert "data.npz" not in text
    second = compress(tmp_path / "1.onnx", energy=0.5, bench=False, simplify=False)
    keys = list(second.model.metadata_props)
    assert len(keys) == len(set(keys))
    assert "author" in keys


def test_a_run_that_changes_nothing_says_nothing(folder: Path, tmp_path: Path) -> None:
    result = factored(folder / "in.onnx", exclude=("*",))
    # onnx_ir itself writes what it knows of types, and other fields first.
    result.save(tmp_path / "o.onnx")
    assert onnx.load(tmp_path / "o.onnx") == onnx.load(folder / "in.onnx")


def test_the_gate_writes_no_recipe(folder: Path, tmp_path: Path) -> None:
    arguments = ["--rank", "1", "--max-error", "1e-6", "--no-bench", "--no-simplify"]
    path = tmp_path / "r.json"
    code = call(folder / "in.onnx", tmp_path / "o.onnx", *arguments, "--save-recipe", path)
    assert code == 3
    assert list(tmp_path.iterdir()) == []


def test_the_recipe_is_no_place_of_the_result(
    folder: Path, recipe: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call(folder / "in.onnx", recipe, "--recipe", recipe, "--force") == 1
    assert "would overwrite" in error(capfd)


def test_the_report_names_the_recipe(folder: Path, recipe: Path, tmp_path: Path) -> None:
    report = report_of(
        folder / "in.onnx", tmp_path / "o.onnx", "--recipe", recipe, "--no-bench", folder=tmp_path
    )
    assert report["settings"]["recipe"] == str(recipe)
    assert report["goal"] is None
    assert_same(
        onnx.load(tmp_path / "o.onnx"),
        factored(folder / "in.onnx", rank=9).model,
        {"x": uniform((4, D), np.random.default_rng(0))},
    )


def test_how_many_samples_judge_is_the_same_for_batches(folder: Path) -> None:
    """Under a tolerance the rows of batches are counted; a recipe of one does so too."""
    x = np.load(folder / "data.npz")["x"]
    feeds = [{"x": x[start : start + 8]} for start in range(0, 400, 8)]
    options: dict[str, Any] = {"data": feeds, "bench": False, "simplify": False}
    first = compress(folder / "in.onnx", tolerance=0.5, objective="size", effort="quick", **options)
    second = compress(folder / "in.onnx", recipe=first.recipe, data=feeds, bench=False)
    told = [
        [note for note in result.report.notes if "samples calibrate" in note]
        for result in (first, second)
    ]
    assert told[0] == told[1] != []
    for name, value in first.model.graph.initializers.items():
        assert value.const_value is not None
        again = second.model.graph.initializers[name].const_value
        assert again is not None
        np.testing.assert_array_equal(value.const_value.numpy(), again.numpy())


def test_a_metric_judges_what_a_recipe_makes(folder: Path, recipe: Path) -> None:
    data = folder / "data.npz"
    result = compress(folder / "in.onnx", recipe=recipe, data=data, metric="cosine", bench=False)
    assert result.report.judged is not None
    assert result.report.judged.metric == "cosine"
    other = compress(
        folder / "in.onnx", keep=0.5, data=data, metric="kl", bench=False, simplify=False
    ).recipe
    with pytest.raises(UsageError, match=r"metric='?cosine'? exclude each other: .* by kl$"):
        compress(folder / "in.onnx", recipe=other, data=data, metric="cosine", bench=False)


def test_effort_without_samples_asks_for_none(folder: Path) -> None:
    options: dict[str, Any] = {"bench": False, "check": False}
    first = compress(folder / "in.onnx", rank=8, effort="thorough", simplify=False, **options)
    second = compress(folder / "in.onnx", recipe=first.recipe, **options)
    assert [layer.rank for layer in second.report.layers] == [
        layer.rank for layer in first.report.layers
    ]
