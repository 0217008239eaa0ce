"""A recipe by hand: a rank that was changed, and what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lowrank import InputError, compress
from onnx_lowrank.graph.provenance import read_metadata
from tests.helpers.commands import call, error
from tests.helpers.models import factored, parse, uniform
from tests.helpers.recipes import fill, layer, of_rank_9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("recipes"))


@pytest.fixture
def recipe(folder: Path, tmp_path: Path) -> Path:
    return of_rank_9(folder, tmp_path / "r.json")


def changed(path: Path, change: Any) -> Path:
    """A recipe after a change of its JSON."""
    plain = json.loads(path.read_text())
    change(plain)
    path.write_text(json.dumps(plain))
    return path


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


def test_another_model_of_the_same_shapes_is_said(
    folder: Path, recipe: Path, tmp_path: Path
) -> None:
    other = onnx.load(folder / "in.onnx")
    other.graph.initializer[0].raw_data = bytes(len(other.graph.initializer[0].raw_data))
    onnx.save(other, tmp_path / "other.onnx")
    result = compress(tmp_path / "other.onnx", recipe=recipe, bench=False, samples=2)
    assert sum("was made for another model" in note for note in result.report.notes) == 1


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
