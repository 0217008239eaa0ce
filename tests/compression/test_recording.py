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

from onnx_lowrank import InputError, UsageError, compress
from onnx_lowrank.graph.provenance import read_metadata
from tests.helpers.commands import call, error, report_of
from tests.helpers.models import assert_same, factored, parse, uniform

D = 48
# Three maps of one activation, two layers behind, one of them with a bias.
TEXT = f"""<ir_version: 8, opset_import: ["": 17]>
    g (float[batch, {D}] x) => (float[batch, 40] y) {{
        [q] q = MatMul(x, Wq)
        [k] k = MatMul(x, Wk)
        [v] v = MatMul(x, Wv)
        a = Tanh(q)
        b = Mul(a, k)
        c = Add(b, v)
        [up] d = Gemm(c, Wu, bu)
        e = Relu(d)
        [down] y = MatMul(e, Wd)
    }}"""
SHAPES = {"Wq": (D, D), "Wk": (D, D), "Wv": (D, D), "Wu": (D, 96), "Wd": (96, 40), "bu": (96,)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with weights of falling spectra, and samples that do not fill the space."""
    place, rng = tmp_path_factory.mktemp("recipes"), np.random.default_rng(3)
    weights = {}
    for name, shape in SHAPES.items():
        weight = rng.standard_normal(shape)
        if len(shape) == 2:
            u, s, v = np.linalg.svd(weight, full_matrices=False)
            weight = (u * s * 0.9 ** np.arange(len(s))) @ v
        weights[name] = weight.astype(np.float32)
    common = weights["Wq"]  # the three of one activation read much the same of it
    for name in ("Wk", "Wv"):
        turn = np.linalg.qr(rng.standard_normal((D, D)))[0]
        weights[name] = (common @ turn + 0.02 * weights[name]).astype(np.float32)
    onnx.save(parse(TEXT, weights), place / "in.onnx")
    mix = rng.standard_normal((20, D)) / 4
    x = rng.standard_normal((400, 20)) @ mix + 0.05 * rng.standard_normal((400, D))
    np.savez(place / "data.npz", x=x.astype(np.float32))
    return place


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
    """A recipe with a rank of 9 in every layer."""
    path = tmp_path / "r.json"
    factored(folder / "in.onnx", rank=9, save_recipe=path)
    return path


def changed(path: Path, change: Any) -> Path:
    """A recipe after a change of its JSON."""
    plain = json.loads(path.read_text())
    change(plain)
    path.write_text(json.dumps(plain))
    return path


def layer(plain: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(own for own in plain["layers"] if own["name"] == name)
    return found


def test_the_file_has_one_line_for_each_layer(recipe: Path) -> None:
    lines = recipe.read_text().splitlines()
    for name in ("q", "k", "v", "up", "down"):
        assert sum(f'"name": "{name}"' in line for line in lines) == 1
    form = "gemm-right"
    assert f'    {{"name": "up", "form": "{form}", "shape": [48, 96], "rank": 9}},' in lines
    assert "in.onnx" not in recipe.read_text()  # no path


def test_a_rank_changed_by_hand(folder: Path, recipe: Path, tmp_path: Path) -> None:
    before = recipe.read_text()

    def change(plain: dict[str, Any]) -> None:
        layer(plain, "k")["rank"] = 13
        layer(plain, "v")["rank"] = None
        plain["layers"].remove(layer(plain, "up"))

    result = compress(
        folder / "in.onnx", recipe=changed(recipe, change), simplify=True, bench=False, samples=2
    )
    assert [row.rank for row in result.report.layers] == [9, 13, None, None, 9]
    whys = [row.reason for row in result.report.layers]
    assert whys[1] == "rank 13 of the recipe"
    assert whys[2] == whys[3] == "the recipe leaves it dense"
    # The others are the same to the last bit.
    assert before != recipe.read_text()
    once = factored(folder / "in.onnx", rank=9).model.graph.initializers
    for name, value in result.model.graph.initializers.items():
        if name.startswith(("q.", "down.")):
            assert value.const_value is not None
            assert value.const_value.tobytes() == once[name].const_value.tobytes()  # type: ignore[union-attr]
    assert result.recipe.changed
    result.save(tmp_path / "o.onnx")
    compress(folder / "in.onnx", recipe=tmp_path / "o.onnx", bench=False, samples=2).save(
        tmp_path / "p.onnx"
    )
    assert (tmp_path / "o.onnx").read_bytes() == (tmp_path / "p.onnx").read_bytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: layer(p, "k").update(name="kk"), ["'kk'", "no linear map of that name", "'k'"]),
        (lambda p: layer(p, "k").update(shape=[48, 47]), ["'k'", "48×47", "48×48"]),
        (lambda p: layer(p, "k").update(form="gemm-left"), ["'k'", "gemm-left", "matmul-right"]),
        (lambda p: layer(p, "k").update(rank=25), ["'k'", "from 1 to 24", "25"]),
        (lambda p: layer(p, "k").update(rank=0), ["'k'", "from 1 to 24", "0"]),
        (lambda p: layer(p, "k").update(rank="9"), ["'k'", "rank", "whole number", '"9"']),
        (lambda p: layer(p, "k").update(rnk=9), ["layer 2", "unknown key 'rnk'", "rank"]),
        (lambda p: layer(p, "k").update(format={"bits": 8}), ["'k'", "format", "'block'"]),
        (
            lambda p: layer(p, "k").update(format={"bits": 8, "block": 16}),
            ["'k'", "format", "--weights"],
        ),
        (
            lambda p: layer(p, "k").update(format={"bits": 5, "block": 16}),
            ["'k'", "bits", "5"],
        ),
        (
            lambda p: (
                p["settings"].update(weights="8"),
                layer(p, "k").update(format={"bits": 8, "block": 24}),
            ),
            ["'k'", "block", "24"],
        ),
        (lambda p: p["layers"].append(layer(p, "k")), ["'k'", "once", "2 times"]),
        (lambda p: p.update(recipe=2), ["version 1", "2"]),
        (lambda p: p.update(extra=2), ["unknown key 'extra'"]),
        (lambda p: p.pop("layers"), ["layers", "a list", "null"]),
        (lambda p: p["settings"].update(sede=2), ["settings", "unknown key 'sede'", "seed"]),
        (lambda p: p["settings"].update(seed=-2), ["settings", "--seed", "-2"]),
        (lambda p: p["goal"].update(energy=7), ["goal", "--energy", "7"]),
        (
            lambda p: p.update(shared=[{"layers": ["q", "up"], "scales": [1, 1]}]),
            ["'up'", "cannot share", "'q'"],
        ),
        (
            lambda p: (
                p.update(shared=[{"layers": ["q", "k"], "scales": [1, 1]}]),
                layer(p, "k").update(rank=8),
            ),
            ["'k'", "shares its first factor", "rank 9", "8"],
        ),
        (
            lambda p: p.update(shared=[{"layers": ["q", "k"], "scales": [1]}]),
            ["shared 1", "scales"],
        ),
        (lambda p: p.update(shared=[{"layers": ["q", "z"], "scales": [1, 1]}]), ["'z'"]),
    ],
)
def test_what_does_not_fit_is_named(
    change: Any,
    words: list[str],
    folder: Path,
    recipe: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    changed(recipe, change)
    code = call(folder / "in.onnx", tmp_path / "o.onnx", "--recipe", recipe, "--no-bench")
    text = error(capfd)
    assert code == 1
    assert not (tmp_path / "o.onnx").exists()
    assert str(recipe) in text
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", ["expected JSON"]),
        (b"[]", ["an object of JSON"]),
        (b'{"\xff": 1}', ["expected JSON"]),
        (b"", ["something else"]),
        (b"{" * 100_000, ["JSON"]),
        (b"[" * 100_000, ["JSON"]),
    ],
    ids=["cut", "list", "not utf-8", "empty", "braces", "brackets"],
)
def test_files_that_are_no_recipes(
    content: bytes,
    words: list[str],
    folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(content)
    assert call(folder / "in.onnx", tmp_path / "o.onnx", "--recipe", path) == 1
    text = error(capfd)
    assert all(word in text for word in words), text


def test_a_model_that_no_run_made_holds_no_recipe(folder: Path) -> None:
    with pytest.raises(InputError, match="without a recipe in its metadata"):
        compress(folder / "in.onnx", recipe=folder / "in.onnx")


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
    with pytest.raises(UsageError, match="fitted to samples"):
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


def test_another_model_of_the_same_shapes_is_said(
    folder: Path, recipe: Path, tmp_path: Path
) -> None:
    other = onnx.load(folder / "in.onnx")
    other.graph.initializer[0].raw_data = bytes(len(other.graph.initializer[0].raw_data))
    onnx.save(other, tmp_path / "other.onnx")
    result = compress(tmp_path / "other.onnx", recipe=recipe, bench=False, samples=2)
    assert sum("was made for another model" in note for note in result.report.notes) == 1


def test_a_dry_run_writes_the_recipe(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    planned = factored(folder / "in.onnx", energy=0.8, dry_run=True, save_recipe=path)
    done = factored(folder / "in.onnx", energy=0.8)
    assert planned.recipe == done.recipe
    once = compress(folder / "in.onnx", recipe=path, check=False, bench=False)
    assert once.recipe == done.recipe


def test_nodes_of_one_name_have_a_number(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    model = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[2, 16] x) => (float[2, 16] y) {
            [same] a = MatMul(x, W)
            b = Relu(a)
            [same] y = MatMul(b, V)
        }""",
        {"W": uniform((16, 16), rng), "V": uniform((16, 16), rng)},
    )
    path = tmp_path / "r.json"
    factored(model, rank=3, save_recipe=path)

    def change(plain: dict[str, Any]) -> None:
        layer(plain, "same#2")["rank"] = 5

    result = compress(model, recipe=changed(path, change), check=False, bench=False)
    assert [row.rank for row in result.report.layers] == [3, 5]


def test_layers_of_one_weight_need_one_rank(tmp_path: Path) -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[2, 16] x) => (float[2, 16] y) {
            [a] a = MatMul(x, W)
            b = Relu(a)
            [b] y = MatMul(b, W)
        }""",
        {"W": uniform((16, 16), np.random.default_rng(0))},
    )
    path = tmp_path / "r.json"
    factored(model, rank=3, save_recipe=path)
    changed(path, lambda plain: layer(plain, "b").update(rank=4))
    with pytest.raises(InputError, match=r"reads the weight of 'a'.*rank 3, got rank 4"):
        compress(model, recipe=path)


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


def test_a_recipe_of_a_thousand_layers_is_small() -> None:
    rng, count = np.random.default_rng(0), 1000
    names = [f"/encoder/layer.{n}/attention/self/query/MatMul" for n in range(count)]
    nodes = [
        onnx.helper.make_node("MatMul", [f"h{n}", f"W{n}"], [f"h{n + 1}"], name=names[n])
        for n in range(count)
    ]
    weights = [onnx.numpy_helper.from_array(uniform((16, 16), rng), f"W{n}") for n in range(count)]
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 16])
        for name in ("h0", f"h{count}")
    ]
    graph = onnx.helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
    )
    result = factored(model, rank=3)
    found = read_metadata(result.model.metadata_props)
    assert len(json.loads(found["recipe"])) == count
    assert sum(map(len, found.values())) < 100_000


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
