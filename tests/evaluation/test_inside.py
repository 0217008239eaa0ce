"""Values inside a model that count as outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank import Result, check, compress, sweep
from onnx_lowrank.errors import InputError
from onnx_lowrank.evaluation.inside import values_named
from onnx_lowrank.numerics.arrays import Array
from tests.helpers.commands import call, error
from tests.helpers.models import parse, uniform

# An encoder that is exported for its map y; what is wanted is its token, which y hardly shows.
ENCODER = """<ir_version: 8, opset_import: ["": 17]>
g (float[N, 32] x) => (float[N, 8] y) {
    t = MatMul(x, Wt)
    token = Identity(t)
    small = Constant<value = float {0.001}>()
    part = Mul(token, small)
    s = MatMul(x, Ws)
    head = MatMul(part, Wh)
    m = MatMul(s, Wm)
    y = Add(m, head)
}"""


def encoder() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    shapes = {"Wt": (32, 32), "Ws": (32, 32), "Wh": (32, 8), "Wm": (32, 8)}
    model = parse(ENCODER, {name: uniform(shape, rng) for name, shape in shapes.items()})
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
    return model


def feeds(count: int = 24) -> list[dict[str, Array]]:
    rng = np.random.default_rng(1)
    return [{"x": uniform((8, 32), rng)} for _ in range(count)]


def compressed(**options: Any) -> Result:
    given = {"keep": 0.6, "rank_multiple": 1, "data": feeds(), "bench": False, "simplify": False}
    return compress(encoder(), **{**given, **options})


def errors(result: Result) -> dict[str, float]:
    found = result.report.check
    assert found is not None
    return {output.name: output.relative_l2 for output in found.providers[0].outputs}


def at_token(result: Result) -> float:
    """The error of the token on other samples, by the verb check."""
    report = check(encoder(), result.model, data=feeds(40)[24:], judge_at=["token"])
    return {output.name: output.relative_l2 for output in report.targets[0].outputs}["token"]


def test_a_value_inside_counts_in_damage_and_check() -> None:
    plain, judged = compressed(), compressed(judge_at=["token"])
    assert list(errors(plain)) == ["y"]
    assert list(errors(judged)) == ["y", "token"]
    assert at_token(judged) < 0.6 * at_token(plain)
    said = [note for note in judged.report.notes if "counted as outputs" in note]
    assert said == ["counted as outputs: 'token' inside the model"]


@pytest.mark.parametrize("simplify", [True, False])
def test_the_face_of_the_result_is_that_of_the_input(simplify: bool) -> None:
    """onnxsim folds the Identity whose output is named; the value is there all the same."""
    result = compressed(judge_at=["node_token"], simplify=simplify)
    proto = ir.to_proto(result.model)
    onnx.checker.check_model(proto, full_check=True)
    assert proto.graph.output == encoder().graph.output
    assert "token" not in [value.name for value in proto.graph.value_info]  # IN declares none
    assert "token" in [name for node in proto.graph.node for name in node.output]
    assert set(errors(result)) == {"y", "token"}


def test_a_planned_run_gives_nothing_more_out() -> None:
    result = compressed(judge_at=["token"], dry_run=True)
    assert [value.name for value in result.model.graph.outputs] == ["y"]


def test_healing_judges_it() -> None:
    """The error of the outputs, which says what step is kept, is that of both."""
    found = []
    for at in ((), ("token",)):
        result = compressed(rank=6, keep=None, exclude=["node_s", "node_m"], judge_at=at, heal=2)
        healing = result.report.healing
        assert healing is not None
        assert set(at) | {"y"} <= set(healing.values)
        found.append(healing.error_before)
    assert found[1] > 100 * found[0]


def test_a_tolerance_is_one_of_the_value_too() -> None:
    options = {"keep": None, "tolerance": 0.05, "objective": "size"}
    plain, judged = compressed(**options), compressed(**options, judge_at=["token"])
    assert at_token(plain) > 0.1
    assert at_token(judged) < 0.1


def test_a_metric_of_the_users_gets_it_and_top1_does_not() -> None:
    """A token as wide as a classifier's output is no answer of one."""
    seen: set[str] = set()

    def score(outputs: Any, _reference: Any, _labels: Any) -> float:
        seen.update(outputs)
        return 1.0

    options = {"keep": None, "tolerance": 0.2, "objective": "size", "judge_at": ["token"]}
    compressed(**options, metric=score)
    assert seen == {"y", "token"}
    judged = compressed(**options, metric="top1")
    assert judged.report.goal is not None
    assert judged.report.goal.loss is not None


def test_a_sweep_counts_it() -> None:
    options: dict[str, Any] = {"data": feeds(), "bench": False, "rank_multiple": 1}
    plain = sweep(encoder(), shares=(0.6,), **options)
    judged = sweep(encoder(), shares=(0.6,), judge_at=["token"], **options)
    damages = [found.points[-1].damage for found in (plain, judged)]
    assert None not in damages
    assert damages[0] != damages[1]


def test_statistics_of_other_values_do_not_tell_the_damage(tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    compressed(save_stats=path)
    note = f"{path}: damage in it is of something else than judge_at=… says"
    assert note not in compressed(load_stats=path).report.notes
    loaded = compressed(load_stats=path, judge_at=["token"])
    assert note in loaded.report.notes
    assert at_token(loaded) < 1.1 * at_token(compressed(judge_at=["token"], effort="quick"))
    compressed(save_stats=path, fisher=True)
    with pytest.raises(InputError, match=r"its Fisher information is for other outputs: expected"):
        compressed(load_stats=path, fisher=True, judge_at=["token"])


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("tokens", "no value or node of this name; did you mean 'token'"),
        ("x", "got an input"),
        ("Wt", "got a constant"),
        ("small", "got a constant"),
    ],
)
def test_a_name_that_is_no_value(
    name: str, why: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    onnx.save(encoder(), tmp_path / "in.onnx")
    arguments = (tmp_path / "in.onnx", tmp_path / "out.onnx", "--judge-at", name)
    assert call(*arguments) == 1
    line = error(capfd)
    assert f"--judge-at {name}: " in line
    assert why in line
    assert not (tmp_path / "out.onnx").exists()
    assert call("check", tmp_path / "in.onnx", tmp_path / "in.onnx", "--judge-at", name) == 1
    assert why in error(capfd)


def test_a_value_in_a_subgraph_cannot_be_given_out() -> None:
    text = """<ir_version: 10, opset_import: ["" : 18]>
    g (float[n] x, bool c) => (float[n] y) {
        y = If(c) <then_branch = t () => (float[n] a) { a = Neg(x) },
                   else_branch = e () => (float[n] b) { b = Abs(x) }>
    }"""
    model = ir.from_onnx_text(text)
    with pytest.raises(InputError, match="got one inside a subgraph or function"):
        values_named(model, ["a"])
    assert values_named(model, ["y"]) == ()  # an output anyway


def test_check_names_what_the_other_model_lacks(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    onnx.save(encoder(), tmp_path / "a.onnx")
    other = encoder()
    other.graph.output.append(onnx.helper.make_tensor_value_info("token", 1, ["N", 32]))
    onnx.save(other, tmp_path / "b.onnx")
    for node in other.graph.node:
        for names in (node.input, node.output):
            names[:] = ["renamed" if name == "token" else name for name in names]
    del other.graph.output[1:]
    onnx.save(other, tmp_path / "c.onnx")
    for name, why in (("b", "is an output there"), ("c", "no node there computes it")):
        model = tmp_path / f"{name}.onnx"
        assert call("check", tmp_path / "a.onnx", model, "--judge-at", "token") == 1
        line = error(capfd)
        assert str(model) in line
        assert why in line


def test_the_gates_see_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    onnx.save(encoder(), tmp_path / "a.onnx")
    out = tmp_path / "b.onnx"
    options = ("--rank", 8, "--no-bench", "--judge-at", "token", "--max-error", 0.2)
    assert call(tmp_path / "a.onnx", out, *options, "--exclude", "node_s") == 3
    assert "output 'token' is off by" in error(capfd)
    result = compress(encoder(), rank=8, exclude=["node_s", "node_m"], bench=False, simplify=False)
    result.save(out)
    checked = ("check", tmp_path / "a.onnx", out, "--max-error", 0.2)
    assert call(*checked) == 0
    assert call(*checked, "--judge-at", "token") == 3
    assert "output 'token' differs by" in error(capfd)


MASKED = """<ir_version: 8, opset_import: ["": 17]>
g (float[B, T, 16] x, int64[B, T] keep) => (float[B, 16] y) {
    h = MatMul(x, W)
    axis = Constant<value = int64[1] {1}>()
    k = Cast<to = 1>(keep)
    k3 = Unsqueeze(k, two)
    kept = Mul(h, k3)
    y = ReduceSum<keepdims = 0>(kept, axis)
}"""


def masked(scale: float) -> onnx.ModelProto:
    weight = uniform((16, 16), np.random.default_rng(3))
    return parse(MASKED, {"W": (scale * weight).astype("f4"), "two": np.array([2])})


def test_the_mask_of_check(tmp_path: Path) -> None:
    """Padding is huge and differs; a named mask leaves it out of values inside too."""
    rng = np.random.default_rng(4)
    x, keep = uniform((4, 5, 16), rng), np.array([[1, 1, 1, 0, 0]] * 4)
    before, after = masked(1.0), masked(1.01)
    options: dict[str, Any] = {"data": {"x": x, "keep": keep}, "judge_at": ["h"]}
    x[keep == 0] *= 1e4
    after.graph.node[0].input[0] = "shifted"
    after.graph.node.insert(0, onnx.helper.make_node("Min", ["x", "limit"], ["shifted"]))
    after.graph.initializer.append(onnx.numpy_helper.from_array(np.array(2, np.float32), "limit"))

    def inside(**more: Any) -> tuple[float, tuple[str, ...]]:
        report = check(before, after, **options, **more)
        return report.targets[0].outputs[1].relative_l2, report.notes

    error, notes = inside()
    assert error > 0.1
    assert not any("padding" in note for note in notes)
    error, notes = inside(mask="keep")
    assert error == pytest.approx(0.01, rel=0.01)
    assert sum("padding counts nowhere" in note for note in notes) == 1
    with pytest.raises(InputError, match=r"mask='other': expected one of the inputs x, keep"):
        inside(mask="other")
    del options["judge_at"]
    report = check(before, after, mask="keep", **options)
    assert "mask='keep': no output declares its axes, so that all rows count" in report.notes
