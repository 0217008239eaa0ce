from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnx_lowrank.data.samples import Samples
from onnx_lowrank.errors import InputError
from onnx_lowrank.evaluation.classifiers import classifier_outputs
from onnx_lowrank.evaluation.outputs import (
    Comparison,
    MeanDamage,
    compare_outputs,
    damage_of,
    mean_damage,
    run_check,
    worst_error,
)
from onnx_lowrank.evaluation.reading import PLAIN, Reading
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.runtime.session import open_session
from onnx_lowrank.schema.measures import OutputCheck, ProviderCheck

INF, NAN = math.inf, math.nan


def one(a: npt.ArrayLike, b: npt.ArrayLike, *, classifier: bool = False) -> OutputCheck:
    (result,) = compare_outputs(
        {"y": np.asarray(a)}, {"y": np.asarray(b)}, Reading(frozenset({"y"} if classifier else ()))
    )
    return result


@pytest.mark.parametrize(
    ("a", "b", "error", "relative", "cosine"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0, 0, 1),
        ([3.0, 4.0], [3.0, 4.5], 0.5, 0.1, (9 + 18) / (5 * math.sqrt(29.25))),
        ([3.0, 4.0], [-3.0, -4.0], 8, 2, -1),
        ([0.0, 0.0], [0.0, 0.0], 0, 0, 1),
        ([0.0, 0.0], [0.0, 2.0], 2, INF, 0),
        ([0.0, 2.0], [0.0, 0.0], 2, 1, 0),
        ([NAN, 1.0], [NAN, 1.0], 0, 0, 1),
        ([INF, -INF, 4.0], [INF, -INF, 5.0], 1, 0.25, 1),
        ([INF, 1.0], [-INF, 1.0], INF, INF, 0),
        ([1.0, 1.0], [NAN, 1.0], INF, INF, 0),
        ([NAN, 1.0], [1.0, 1.0], INF, INF, 0),
        ([NAN], [INF], INF, INF, 0),
        ([NAN], [NAN], 0, 0, 1),
        ([3e200, 4e200], [3e200, 4.5e200], 0.5e200, 0.1, 27 / (5 * math.sqrt(29.25))),
        ([3e-200, 4e-200], [3e-200, 4.5e-200], 0.5e-200, 0.1, 27 / (5 * math.sqrt(29.25))),
        (5.0, 6.0, 1, 0.2, 1),
        ([3 + 4j], [3 + 5j], 1, 0.2, 29 / (5 * math.sqrt(34))),
    ],
)
def test_figures(
    a: npt.ArrayLike, b: npt.ArrayLike, error: float, relative: float, cosine: float
) -> None:
    result = one(a, b)
    assert result.max_abs_error == pytest.approx(error, rel=1e-12)
    assert result.relative_l2 == pytest.approx(relative, rel=1e-12)
    alone = np.size(a) < 2
    assert result.cosine == (None if alone else pytest.approx(cosine, rel=1e-12))
    assert result.top1_agreement is None


def test_single_precision_is_widened_first() -> None:
    a = np.full(10_000_000, 0.1, np.float32)
    assert one(a, a + np.float32(0.1)).relative_l2 == pytest.approx(1, rel=1e-7)
    large = np.array([60000.0], np.float16)
    assert one(large, -large).max_abs_error == 120000


def test_other_types() -> None:
    assert one([1, 2], [1, 4]).max_abs_error == 2
    assert one(np.array([1], np.uint8), np.array([3], np.uint8)).max_abs_error == 2
    assert one([True, False], [True, True]).max_abs_error == 1
    small = np.array([1, 2], ml_dtypes.bfloat16)
    assert one(small, small).relative_l2 == 0


def test_strings() -> None:
    comparison = Comparison()
    words = np.array(["a", "b", "c", "d"], object)
    comparison.add({"y": words}, {"y": np.array(["a", "b", "c", "x"], object)})
    (result,) = comparison.results()
    assert (result.max_abs_error, result.relative_l2, result.cosine) == (1.0, 0.25, None)
    assert list(comparison.notes) == [
        "output 'y' holds strings: relative_l2 is the share that differs"
    ]


def test_integers_are_the_same_or_not() -> None:
    ids = one([1000, 7, 7, 3], [1001, 7, 7, 3])
    assert (ids.max_abs_error, ids.relative_l2, ids.cosine) == (1.0, 0.25, None)
    assert one([True, True], [True, False]).relative_l2 == 0.5
    # Eight bits are what quantized models compute with.
    assert one(np.array([100, 100], np.uint8), np.array([101, 100], np.uint8)).relative_l2 < 0.01


def test_one_number_has_no_direction() -> None:
    assert one([[2.0]], [[5.0]]).cosine is None
    assert one([[2.0]], [[5.0]]).relative_l2 == pytest.approx(1.5)


def test_an_empty_output_is_not_compared() -> None:
    comparison = Comparison()
    comparison.add(
        {"y": np.zeros((0, 4)), "z": np.ones(2)}, {"y": np.zeros((0, 4)), "z": np.ones(2)}
    )
    assert [output.name for output in comparison.results()] == ["z"]
    assert comparison.empty == ("y",)


LOOSE = Reading(loose=frozenset({"y"}))


@pytest.mark.parametrize(
    ("a", "b", "relative"),
    [
        ([[0, 1], [2, 3], [4, 5]], [[2, 3], [0, 1]], 1 / 3),  # rows, in any order
        ([[0, 1]], [[2, 3], [4, 5]], 1.0),
        ([3.0, 4.0], [3.0], 0.8),  # what only one has counts as zeros in the other
        ([[3.0]], [[3.0], [4.0]], 4 / 3),
        (np.zeros((0, 3), np.int64), [[0, 1, 2]], 1.0),
    ],
)
def test_sizes_that_depend_on_the_model(
    a: npt.ArrayLike, b: npt.ArrayLike, relative: float
) -> None:
    comparison = Comparison(LOOSE)
    comparison.add({"y": np.asarray(a)}, {"y": np.asarray(b)})
    (result,) = comparison.results()
    assert result.relative_l2 == pytest.approx(relative)
    assert any("size depends on what the model computes" in note for note in comparison.notes)


def test_padding_counts_nowhere() -> None:
    keep = np.array([[True, True, False]])
    reading = Reading(classifiers=frozenset({"y"}), mask="mask", masked=frozenset({"y"}))
    a = np.array([[[1.0, 0], [0, 1], [5, 0]]])
    b = np.array([[[1.0, 0], [0, 1], [0, 9]]])
    for shape in ((1, 3, 2), (3, 2)):  # as it is, and with a flattened batch
        before, after = {"y": a.reshape(shape)}, {"y": b.reshape(shape)}
        comparison = Comparison(reading)
        comparison.add(before, after, keep)
        (result,) = comparison.results()
        assert (result.relative_l2, result.top1_agreement) == (0.0, 1.0)
        assert damage_of(before, after, reading, keep) == 0.0
        assert damage_of(before, after) == pytest.approx((25 + 81) / 27)
    pooled = {"z": np.ones((3, 2))}
    comparison = Comparison(reading)
    comparison.add(pooled, {"z": np.zeros((3, 2))}, keep)
    assert comparison.results()[0].relative_l2 == 1.0


def test_top1() -> None:
    a = np.array([[1.0, 2, 3], [3, 2, 1], [0, 1, 0], [5, 0, 0]])
    b = np.array([[1.0, 3, 2], [9, 2, 1], [0, 1, 0], [5, 0, 0]])
    assert one(a, b, classifier=True).top1_agreement == 0.75
    assert one(a, b).top1_agreement is None
    assert one(a.reshape(2, 2, 3), b.reshape(2, 2, 3), classifier=True).top1_agreement == 0.75
    assert one(1.0, 1.0, classifier=True).top1_agreement is None
    assert one([[1.0]], [[2.0]], classifier=True).top1_agreement is None


def test_means_over_samples() -> None:
    comparison = Comparison(Reading(frozenset({"y"})))
    comparison.add({"y": np.array([[1.0, 0.0]])}, {"y": np.array([[1.0, 0.0]])})
    comparison.add({"y": np.array([[2.0, 0.0]] * 3)}, {"y": np.array([[0.0, 2.0]] * 3)})
    (result,) = comparison.results()
    assert result.max_abs_error == 2
    assert result.relative_l2 == pytest.approx(math.sqrt(2) / 2)
    assert result.cosine == pytest.approx(0.5)
    assert result.top1_agreement == 0.25  # rows, not samples


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({}, "the result has no such output"),
        ({"y": np.zeros((1, 2))}, r"the result has shape \[1, 2\], expected \[2\]"),
        ({"y": np.array(["a", "b"], object)}, "the result has type object, expected float64"),
    ],
)
def test_outputs_that_cannot_be_compared(found: Mapping[str, Array], message: str) -> None:
    with pytest.raises(InputError, match=f"output 'y': {message}"):
        compare_outputs({"y": np.zeros(2)}, found)


def session(factor: float, size: str = "N") -> ort.InferenceSession:
    model = ir.from_onnx_text(
        f"""<ir_version: 8, opset_import: ["" : 18]> g (float[{size}, 2] x)
        => (float[{size}, 2] y, float[{size}, 2] z) <float f = {{{factor}}}>
        {{ y = Mul(x, f) z = Identity(x) }}"""
    )
    return open_session(ir.to_proto(model).SerializeToString())


def samples(expected: Sequence[Mapping[str, Array] | None] = (None, None)) -> Samples:
    x = np.array([[3, 4]], np.float32)
    feeds = ({"x": x}, {"x": np.concatenate([x, x])})
    return Samples("d.npz", feeds, tuple(expected), (), 2)


def test_the_damage_is_told_as_the_caller_says() -> None:
    def told(before: Feed, after: Feed, feed: Feed) -> float | None:
        assert before.keys() == after.keys()
        return float(len(feed["x"]))

    both, data = (session(1), session(1.5)), samples()
    _, damage, _ = run_check(*both, data, provider="P", reading=PLAIN, damage=told)
    assert damage.mean == 1.5  # one row, and two
    assert damage.error == pytest.approx(0.5)
    _, plain, _ = run_check(*both, data, provider="P", reading=PLAIN)
    assert plain.mean == pytest.approx(0.5 * 0.5**2)


def test_a_mean_damage_knows_how_sure_it_is() -> None:
    assert mean_damage([None, None]) == MeanDamage(None)
    assert mean_damage([None, 2.0]) == MeanDamage(2.0)
    assert mean_damage([1.0, float("nan")]) == MeanDamage(None)
    assert mean_damage([1.0, float("inf")]) == MeanDamage(float("inf"))
    found = mean_damage([1.0, None, 2.0, 6.0])
    assert found.mean == 3.0
    assert found.error == pytest.approx(np.sqrt((4 + 1 + 9) / 2 / 3))


def test_run_check() -> None:
    done: list[int] = []
    check, _, notes = run_check(
        session(1),
        session(1.5),
        samples(),
        provider="P",
        reading=Reading(frozenset({"z"})),
        progress=done.append,
    )
    y, z = check.outputs
    assert (check.provider, y.name, z.name, notes, done) == ("P", "y", "z", (), [1, 2])
    assert (y.max_abs_error, y.top1_agreement) == (2.0, None)
    assert y.relative_l2 == pytest.approx(0.5)
    assert z == OutputCheck("z", 0.0, 0.0, 1.0, 1.0, 3)
    name, error = worst_error([check])
    assert name == "y"
    assert error == pytest.approx(0.5)


def test_run_check_names_the_model_that_fails() -> None:
    with pytest.raises(InputError, match=r"^the result: ONNX Runtime does not run it"):
        run_check(session(1), session(1, "1"), samples(), provider="P", reading=PLAIN)
    with pytest.raises(InputError, match=r"^the original: ONNX Runtime does not run it"):
        run_check(session(1, "1"), session(1), samples(), provider="P", reading=PLAIN)


@pytest.mark.parametrize(
    ("stored", "note"),
    [
        ([3, 4], "the original agrees with the stored outputs of 1 sample to 0.0e+00 relative"),
        ([6, 8], "the original deviates from the stored outputs of 1 sample by 5.0e-01 relative"),
        ([6], "stored outputs do not fit the model: output 'y': the original has shape"),
    ],
)
def test_stored_outputs(stored: list[float], note: str) -> None:
    expected = ({"y": np.array([stored], np.float32)}, None)
    _, _, notes = run_check(session(1), session(2), samples(expected), provider="P", reading=PLAIN)
    assert len(notes) == 1
    assert notes[0].startswith(note)


def test_not_finite_outputs_are_said() -> None:
    x = np.array([[NAN, 1]], np.float32)
    data = Samples("d", ({"x": x},), (None,), (), 1)
    check, _, notes = run_check(session(1), session(1), data, provider="P", reading=PLAIN)
    assert notes[0] == "output 'y': both models give the same NaN or Inf in places"
    assert check.outputs[0].relative_l2 == 0
    comparison = Comparison()
    comparison.add({"y": x}, {"y": np.ones_like(x)})
    assert list(comparison.notes) == ["output 'y': NaN or Inf in only one of the two models"]


def test_worst_error() -> None:
    def check(*errors: float) -> ProviderCheck:
        outputs = (OutputCheck(f"o{e}", 0.0, e, 1.0, None) for e in errors)
        return ProviderCheck("P", tuple(outputs))

    assert worst_error([check(0.1, 0.3), check(0.2)]) == ("o0.3", 0.3)
    assert worst_error([check(0.1), check(INF)]) == ("oinf", INF)
    assert worst_error([]) == ("", 0.0)


# --- classifiers

WEIGHTS = (
    "float[4, 3] W = {1,2,3,4,5,6,7,8,9,10,11,12}, float[3, 4] V = {1,2,3,4,5,6,7,8,9,10,11,12}, "
    "float[3] b = {1, 2, 3}, float[4, 1] w1 = {1, 2, 3, 4}, int64[2] s6 = {-1, 6}, "
    "int64[2] s3 = {-1, 3}"
)


@pytest.mark.parametrize(
    ("body", "output", "expected"),
    [
        ("y = Gemm(x, W, b)", "float[N, 3] y", True),
        ("y = Gemm<transB = 1>(x, V)", "float[N, 3] y", True),
        ("y = MatMul(x, W)", "float[N, 3] y", True),
        ("m = MatMul(x, W) y = Add(m, b)", "float[N, 3] y", True),
        ("m = MatMul(x, W) y = Add(b, m)", "float[N, 3] y", True),
        ("m = MatMul(x, W) y = Add(b, m)", "float y", True),
        ("t = Transpose<perm = [1, 0]>(V) y = MatMul(x, t)", "float[N, 3] y", True),
        ("m = MatMul(x, W) y = Softmax(m)", "float[N, 3] y", True),
        ("m = Relu(x) y = LogSoftmax(m)", "float[N, 4] y", True),
        ("m = MatMul(x, W) c = Identity(m) y = Reshape(c, s3)", "float[N, 3] y", True),
        ("m = MatMul(x, W) y = Cast<to = 10>(m)", "float16[N, 3] y", True),
        ("e = Exp(x) s = ReduceSum(e, ax) y = Div(e, s)", "float[N, 4] y", True),
        ("e = Exp(x) s = ReduceSum<keepdims = 0>(e, ax) u = Unsqueeze(s, ax) y = Div(e, u)",
         "float[N, 4] y", True),
        ("probs = Sigmoid(x)", "float[N, 4] probs", True),
        ("my_logits = Relu(x)", "float[N, 4] my_logits", True),
        ("my_logits = Relu(x)", "float[N, M] my_logits", True),
        # What is none:
        ("y = Sigmoid(x)", "float[N, 4] y", False),
        ("y = Relu(x)", "float[N, 4] y", False),
        ("e = Exp(x) s = ReduceSum(e) y = Div(e, s)", "float[N, 4] y", False),
        ("e = Exp(x) s = ReduceSum(e, a0) y = Div(e, s)", "float[N, 4] y", False),
        ("e = Exp(x) s = ReduceSum(x, ax) y = Div(e, s)", "float[N, 4] y", False),
        ("e = Relu(x) s = ReduceSum(e, ax) y = Div(e, s)", "float[N, 4] y", False),
        ("m = MatMul(x, W) y = Relu(m)", "float[N, 3] y", False),
        ("m = MatMul(x, W) y = Add(m, m)", "float[N, 3] y", False),
        ("m = MatMul(x, W) t = MatMul(m, V) y = Add(t, x)", "float[N, 4] y", False),
        ("m = MatMul(x, W) y = LayerNormalization(m, b)", "float[N, 3] y", False),
        ("m = MatMul(x, W) y = LpNormalization(m)", "float[N, 3] y", False),
        ("m = MatMul(x, W) y = Softmax<axis = 0>(m)", "float[N, 3] y", False),
        ("y = MatMul(x, w1)", "float[N, 1] y", False),
        ("prob = MatMul(x, w1)", "float[N, 1] prob", False),
        ("y = MatMul(x, w1)", "float y", False),
        ("m = MatMul(x, W) y = Transpose<perm = [1, 0]>(m)", "float[3, N] y", False),
        ("m = MatMul(x, W) y = Transpose(m)", "float y", False),
        ("m = MatMul(x, W) y = Reshape(m, s6)", "float[N, 6] y", False),
        ("text_embeds = MatMul(x, W)", "float[N, 3] text_embeds", False),
        ("pred_boxes = MatMul(x, W)", "float[N, 3] pred_boxes", False),
        ("m = MatMul(x, W) label = ArgMax(m)", "int64[N, 1] label", False),
        ("t = Transpose(x) y = MatMul(x, t)", "float[N, N] y", False),
        ("scores = ReduceSum<keepdims = 0>(x, ax)", "float[N] scores", False),
    ],
)  # fmt: skip
def test_classifier_outputs(body: str, output: str, expected: bool) -> None:
    model = ir.from_onnx_text(
        f'<ir_version: 8, opset_import: ["" : 18]> g (float[N, 4] x) => ({output}) '
        f"<{WEIGHTS}, int64[1] ax = {{1}}, int64[1] a0 = {{0}}> {{ {body} }}"
    )
    name = model.graph.outputs[0].name
    if output == "float y":  # a type without a shape cannot be written as text
        model.graph.outputs[0].shape = None
    assert classifier_outputs(model) == ({name} if expected else set())


def test_a_softmax_that_is_declared_a_scalar() -> None:
    """As Paddle does where it does not know the shape; its axis is the last of [N, T, classes]."""
    model = ir.from_onnx_text(
        '<ir_version: 7, opset_import: ["" : 11]> g (float[N, T, 4] x) => (float y) '
        "{ h = Relu(x) y = Softmax<axis = 2>(h) }"
    )
    model.graph.outputs[0].shape = ir.Shape([])
    assert classifier_outputs(model) == {"y"}


def test_softmax_axis_before_opset_13() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 7, opset_import: ["" : 11]> g (float[N, 4] x) => (float[N, 4] y) '
        "{ y = Softmax(x) }"
    )
    assert classifier_outputs(model) == {"y"}


def test_declared_scalar_is_taken_for_unknown() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 7, opset_import: ["" : 18]> g (float[N, 4] x) => (float[] y) '
        "{ y = Softmax(x) }"
    )
    assert classifier_outputs(model) == {"y"}
