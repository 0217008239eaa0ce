from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from onnxruntime.quantization import CalibrationDataReader

from onnx_lowrank import InputError, Result, UsageError, calibrate, compress
from onnx_lowrank.calibrate import Statistics, find_mask, gather, statistics_of
from onnx_lowrank.constants import Constants
from onnx_lowrank.find import Group, find
from onnx_lowrank.forms import all_forms, chosen_forms
from onnx_lowrank.statistics_file import fingerprint
from tests.models import distance, factored, parse, run_ort, uniform

Array = npt.NDArray[Any]
Feed = dict[str, Array]

MINILM = Path(__file__).parent.parent / "models" / "cache" / "minilm-l6.onnx"
HEAD = '<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>'


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def groups_of(model: ir.Model, ops: tuple[str, ...] = ("all",)) -> tuple[Group, ...]:
    return find(model, Constants(model, False), all_forms(), chosen_forms(ops)).groups


def gathered(
    proto: onnx.ModelProto,
    fit: Sequence[Feed],
    *,
    held: Sequence[Feed] = (),
    mask: str | None = None,
    ops: tuple[str, ...] = ("all",),
) -> tuple[Statistics, list[list[str]], tuple[Group, ...]]:
    """Statistics, the outputs of each model that was run, and the groups."""
    model = ir.from_proto(proto)
    groups = groups_of(model, ops)
    opened: list[list[str]] = []

    def open_model(copy: ir.Model) -> Any:
        made = ir.to_proto(copy)
        opened.append([output.name for output in made.graph.output])
        names = {value.name for value in made.graph.input}
        return lambda feed: run_ort(made, {k: v for k, v in feed.items() if k in names})

    found = gather(model, groups, open_model, fit, held, mask, lambda _: None)
    return statistics_of(model, groups, found), opened, groups


# --- what each form multiplies

NODES = {
    "right": ("y = MatMul(x, W)", (2, 3, 6), (6, 5)),
    "right vector": ("y = MatMul(x, W)", (6,), (6, 5)),
    "right batch": ("y = MatMul(x, W)", (2, 4, 3, 6), (4, 6, 5)),
    "right stretched": ("y = MatMul(x, W)", (3, 6), (4, 6, 5)),
    "right batch of 1": ("y = MatMul(x, W)", (4, 3, 6), (1, 6, 5)),
    "right two batches": ("y = MatMul(x, W)", (2, 1, 3, 6), (2, 4, 6, 5)),
    "left": ("y = MatMul(W, x)", (2, 6, 3), (5, 6)),
    "left vector": ("y = MatMul(W, x)", (6,), (5, 6)),
    "left batch": ("y = MatMul(W, x)", (4, 6, 3), (4, 5, 6)),
    "gemm": ("y = Gemm(x, W)", (3, 6), (6, 5)),
    "gemm transB": ("y = Gemm<transB=1>(x, W)", (3, 6), (5, 6)),
    "gemm transA": ("y = Gemm<transA=1>(x, W)", (6, 3), (6, 5)),
    "gemm transAB": ("y = Gemm<transA=1, transB=1>(x, W)", (6, 3), (5, 6)),
    "gemm left": ("y = Gemm(W, x)", (6, 3), (5, 6)),
    "gemm left transA": ("y = Gemm<transA=1>(W, x)", (6, 3), (6, 5)),
    "gemm left transB": ("y = Gemm<transB=1>(W, x)", (3, 6), (5, 6)),
    "fused gemm": ('y = com.microsoft.FusedGemm<transA=1, activation="LeakyRelu", '
                   'activation_alpha=1.0>(x, W)', (6, 3), (6, 5)),
    "fused": ("y = com.microsoft.FusedMatMul(x, W)", (2, 3, 6), (6, 5)),
    "fused transA": ("y = com.microsoft.FusedMatMul<transA=1>(x, W)", (2, 6, 3), (6, 5)),
    "fused transB": ("y = com.microsoft.FusedMatMul<transB=1>(x, W)", (2, 3, 6), (5, 6)),
    "fused left": ("y = com.microsoft.FusedMatMul(W, x)", (2, 6, 3), (5, 6)),
    "fused left transA": ("y = com.microsoft.FusedMatMul<transA=1>(W, x)", (2, 6, 3), (6, 5)),
    "fused left transB": ("y = com.microsoft.FusedMatMul<transB=1>(W, x)", (2, 3, 6), (5, 6)),
    "einsum": ('y = Einsum<equation="bsd,dhk->bshk">(x, W)', (2, 3, 6), (6, 4, 2)),
    "einsum first": ('y = Einsum<equation="dh,bds->bhs">(W, x)', (2, 6, 3), (6, 4)),
    "einsum two": ('y = Einsum<equation="bhsk,khd->bsd">(x, W)', (2, 3, 5, 4), (4, 3, 6)),
    "einsum batch": ('y = Einsum<equation="bhk,hkd->bhd">(x, W)', (2, 3, 4), (3, 4, 5)),
    "einsum dots": ('y = Einsum<equation="...d,dh->...h">(x, W)', (2, 3, 6), (6, 4)),
    "einsum inner dots": ('y = Einsum<equation="d...b,dh->h...b">(x, W)', (6, 2, 3, 2), (6, 4)),
    "einsum stretched": ('y = Einsum<equation="bhk,hkd->bhd">(x, W)', (2, 1, 4), (3, 4, 5)),
    "einsum one weight": ('y = Einsum<equation="bhk,hkd->bhd">(x, W)', (2, 3, 4), (1, 4, 5)),
    "conv": ("y = Conv(x, W)", (2, 3, 6, 5), (4, 3, 3, 3)),
    "conv 1x1": ("y = Conv(x, W)", (2, 3, 6, 5), (4, 3, 1, 1)),
    "conv pads": ("y = Conv<pads=[1,0,2,1]>(x, W)", (2, 3, 6, 5), (4, 3, 3, 2)),
    "conv strides": ("y = Conv<strides=[2,3], pads=[1,1,1,1]>(x, W)", (1, 3, 9, 8), (4, 3, 3, 3)),
    "conv dilations": ("y = Conv<dilations=[2,3]>(x, W)", (1, 3, 9, 9), (4, 3, 3, 2)),
    "conv upper": (
        'y = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, W)', (1, 3, 7, 8), (4, 3, 2, 3)
    ),
    "conv lower": (
        'y = Conv<auto_pad="SAME_LOWER", strides=[2,1]>(x, W)', (1, 3, 8, 7), (4, 3, 3, 2)
    ),
    "conv valid": ('y = Conv<auto_pad="VALID", dilations=[2,1]>(x, W)', (1, 3, 8, 7), (4, 3, 3, 2)),
    "conv 1d": ("y = Conv<pads=[2,1], strides=[2]>(x, W)", (2, 3, 9), (4, 3, 4)),
    "conv 3d": ("y = Conv(x, W)", (1, 2, 4, 5, 4), (3, 2, 2, 3, 2)),
}  # fmt: skip


def one_node(node: str, x: Sequence[int], weight: Array, rank: int) -> onnx.ModelProto:
    dims = ", ".join(map(str, x))
    rest = ", ".join("?" * rank)
    return parse(f"{HEAD} g (float[{dims}] x) => (float[{rest}] y) {{ {node} }}", {"W": weight})


@pytest.mark.parametrize("case", NODES)
def test_vectors_times_the_matrix_are_the_outputs(case: str, rng: np.random.Generator) -> None:
    node, x, w = NODES[case]
    array, weight = uniform(x, rng), uniform(w, rng)
    ranks = {"conv": len(x), "right stretched": 3, "vector": 1}
    rank = next((r for key, r in ranks.items() if key in case), len(x))
    rank = {"einsum": 4, "einsum two": 3}.get(case, rank)
    proto = one_node(node, x, weight, rank)
    expected = run_ort(proto, {"x": array})["y"]
    model = ir.from_proto(proto)
    sites = [
        m.site for g in groups_of(model) for m in g.members if m.site.form.name[:8] != "conv-spa"
    ]
    (site,) = sites
    vectors = site.form.vectors(site, array)
    assert vectors.shape[0] == site.slices
    found = vectors @ site.matrix.numpy()
    np.testing.assert_allclose(np.sort(found.ravel()), np.sort(expected.ravel()), atol=1e-5)


@pytest.mark.parametrize("attributes", ["", "<pads=[1,1,1,1]>", "<strides=[2,2], dilations=[1,2]>"])
def test_columns_under_a_kernel(attributes: str, rng: np.random.Generator) -> None:
    weight = uniform((4, 3, 3, 3), rng)
    weight[..., [0, 2]] = 0  # what is left is the middle column
    x = uniform((2, 3, 8, 8), rng)
    proto = one_node(f"y = Conv{attributes}(x, W)", x.shape, weight, 4)
    sites = [m.site for g in groups_of(ir.from_proto(proto)) for m in g.members]
    (site,) = [site for site in sites if site.form.name == "conv-spatial"]
    found = (site.form.vectors(site, x) @ site.matrix.numpy()).reshape(-1, 3, 4)[:, 1]
    expected = run_ort(proto, {"x": x})["y"]
    np.testing.assert_allclose(np.sort(found.ravel()), np.sort(expected.ravel()), atol=1e-5)


def test_patches_of_a_large_image_come_from_all_of_it() -> None:
    y, x = np.mgrid[:256, :256]
    image = np.stack([y, x])[None].astype(np.float32)
    proto = one_node("y = Conv(x, W)", image.shape, np.ones((3, 2, 1, 1), np.float32), 4)
    site = groups_of(ir.from_proto(proto))[0].members[0].site
    (places,) = site.form.vectors(site, image)
    assert len(places) == 1024
    assert len(np.unique(places, axis=0)) == 1024
    assert all(len(np.unique(column)) > 200 for column in places.T)
    np.testing.assert_array_equal(places, site.form.vectors(site, image)[0])


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_steps_of_a_recurrent_cell(kind: str, rng: np.random.Generator) -> None:
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    proto = parse(
        f"{HEAD} g (float[5, 2, 6] x) => (float[?, ?, ?, ?] y) {{"
        f'y = {kind}<hidden_size=3, direction="bidirectional">(x, W, R) }}',
        {"W": uniform((2, gates * 3, 6), rng), "R": uniform((2, gates * 3, 3), rng)},
    )
    x = uniform((5, 2, 6), rng)
    statistics, _, groups = gathered(proto, [{"x": x}])
    (moments,) = statistics.fit[groups[0]]
    rows = x.reshape(-1, 6).astype(np.float64)
    np.testing.assert_allclose(moments.second, rows.T @ rows / 10, rtol=1e-5)


def test_the_rows_of_an_attention(rng: np.random.Generator) -> None:
    proto = parse(
        f"{HEAD} g (float[2, 4, 6] x) => (float[?, ?, ?] y) {{"
        "y = com.microsoft.Attention<num_heads=2>(x, W, b) }",
        {"W": uniform((6, 18), rng), "b": uniform((18,), rng)},
    )
    x = uniform((2, 4, 6), rng)
    statistics, _, groups = gathered(proto, [{"x": x}])
    (moments,) = statistics.fit[groups[0]]
    rows = x.reshape(-1, 6).astype(np.float64)
    np.testing.assert_allclose(moments.second, rows.T @ rows / 8, rtol=1e-5)


def test_tokens_are_counted(rng: np.random.Generator) -> None:
    proto = parse(
        f"{HEAD} g (int64[2, 3] ids, int64[2, 3] mask) => (float[2, 3, 4] y) {{"
        "same = Identity(ids) y = Gather(W, same) }",
        {"W": uniform((7, 4), rng)},
    )
    del proto.graph.value_info[:]
    ids = np.array([[0, 6, -1], [2, 2, 0]])
    mask = np.array([[1, 1, 1], [1, 0, 0]])
    statistics, _, groups = gathered(proto, [{"ids": ids, "mask": mask}], mask="mask")
    (moments,) = statistics.fit[groups[0]]
    assert (moments.second * 4).tolist() == [1, 0, 1, 0, 0, 0, 2]


# --- gathering

SHARED = f"""{HEAD} g (float[B, T, 6] x, int64[B, T] attention_mask) => (float[B, T, 6] y) {{
    h = Tanh(x)
    q = MatMul(h, Wq)
    k = MatMul(h, Wk)
    flat_shape = Constant<value = int64[2] {{-1, 6}}>()
    both = Add(q, k)
    flat = Reshape(both, flat_shape)
    g = Gemm<transB=1>(flat, Wg)
    z = Einsum<equation="btd,dhk->bthk">(h, We)
    shape = Shape(x)
    back = Reshape(g, shape)
    zs = Reshape(z, shape)
    y = Add(back, zs)
}}"""


@pytest.fixture
def shared(rng: np.random.Generator) -> onnx.ModelProto:
    weights = {"Wq": (6, 6), "Wk": (6, 6), "Wg": (6, 6), "We": (6, 2, 3)}
    return parse(SHARED, {name: uniform(shape, rng) for name, shape in weights.items()})


def texts(rng: np.random.Generator, count: int) -> list[Feed]:
    """Sequences of different lengths, padded."""
    feeds = []
    for _ in range(count):
        length = int(rng.integers(2, 6))
        mask = (np.arange(length) < rng.integers(1, length + 1, (2, 1))).astype(np.int64)
        x = uniform((2, length, 6), rng)
        feeds.append({"x": x, "attention_mask": mask})
    return feeds


def test_an_input_that_several_layers_share_is_gathered_once(
    shared: onnx.ModelProto, rng: np.random.Generator
) -> None:
    feeds = texts(rng, 4)
    statistics, opened, groups = gathered(shared, feeds)
    assert sorted(opened[0]) == ["flat", "h"]
    assert len(opened) == 1
    first = {group.matrix.name: statistics.fit[group] for group in groups}
    assert first["Wq"][0].second is first["Wk"][0].second is first["We"][0].second
    rows = np.tanh(np.concatenate([feed["x"].reshape(-1, 6) for feed in feeds]).astype(float))
    np.testing.assert_allclose(first["Wq"][0].second, rows.T @ rows / len(rows), rtol=1e-5)
    assert not statistics.held
    assert not statistics.missing


def test_steps_of_an_unrolled_loop_are_added_up_in_one_place(rng: np.random.Generator) -> None:
    proto = parse(
        f"{HEAD} g (float[N, 6] x) => (float[N, 5] a, float[N, 5] b, float[N, 4] c) {{"
        "one = Tanh(x) two = Sin(x) three = Cos(x)"
        "a = MatMul(one, W) b = MatMul(two, W) t = MatMul(three, W) c = MatMul(three, V) }",
        {"W": uniform((6, 5), rng), "V": uniform((6, 4), rng)},
    )
    feeds, held = ([{"x": uniform((9, 6), rng)} for _ in range(n)] for n in (3, 2))
    model = ir.from_proto(proto)
    groups = groups_of(model)

    def opened(copy: ir.Model) -> Any:
        return functools.partial(run_ort, ir.to_proto(copy))

    found = gather(model, groups, opened, feeds, held, None, lambda _: None)
    assert sorted(name for name, _, _ in found) == ["one two", "three"]  # V reads three too
    statistics = statistics_of(model, groups, found)
    for samples, kind in ((feeds, statistics.fit), (held, statistics.held)):
        x = np.concatenate([feed["x"] for feed in samples]).astype(float)
        parts = {"W": [np.tanh(x), np.sin(x), np.cos(x)], "V": [np.cos(x)]}
        for group in groups:
            rows = np.concatenate(parts[group.matrix.name or ""])
            (moments,) = kind[group]
            assert moments.rows == len(rows)
            np.testing.assert_allclose(moments.second, rows.T @ rows / len(rows), rtol=1e-5)


def test_padding_is_left_out_also_where_the_batch_is_flattened(
    shared: onnx.ModelProto, rng: np.random.Generator
) -> None:
    feeds = texts(rng, 5)
    kept = [{**f, "x": np.where(f["attention_mask"][..., None], f["x"], np.nan)} for f in feeds]
    statistics, _, groups = gathered(shared, kept, mask="attention_mask")  # NaN is never seen
    count = sum(int(feed["attention_mask"].sum()) for feed in feeds)
    for group in groups:
        assert statistics.fit[group][0].rows == count
    rows = np.tanh(np.concatenate([f["x"][f["attention_mask"] > 0] for f in feeds]).astype(float))
    (moments,) = statistics.fit[groups[0]]
    np.testing.assert_allclose(moments.second, rows.T @ rows / count, rtol=1e-5)


def test_a_mask_over_what_a_layer_sums_leaves_nothing_out(rng: np.random.Generator) -> None:
    proto = parse(
        f"{HEAD} g (float[2, 4, 3] x, int64[2, 4] mask) => (float[2, 5, 3] y) {{"
        "y = MatMul(W, x) }",
        {"W": uniform((5, 4), rng)},
    )
    feed = {"x": uniform((2, 4, 3), rng), "mask": np.array([[1, 1, 0, 0], [1, 1, 1, 0]])}
    statistics, opened, groups = gathered(proto, [feed], mask="mask")
    assert statistics.fit[groups[0]][0].rows == 6
    assert not opened  # the activation is an input: nothing was run


def test_passes_over_the_samples_give_the_same(
    shared: onnx.ModelProto, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    feeds, held = texts(rng, 4), texts(rng, 2)
    one, opened, groups = gathered(shared, feeds, held=held)
    monkeypatch.setattr(calibrate, "_MEMORY", 100)
    two, passes, again = gathered(shared, feeds, held=held)
    assert [len(opened), len(passes)] == [1, 2]
    for group, other in zip(groups, again, strict=True):
        for a, b in ((one.fit, two.fit), (one.held, two.held)):
            np.testing.assert_array_equal(a[group][0].second, b[other][0].second)
            np.testing.assert_array_equal(a[group][0].mean, b[other][0].mean)


@pytest.mark.parametrize("memory", [100, 1 << 30])
def test_progress_adds_up_to_the_samples(
    memory: int, shared: onnx.ModelProto, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "_MEMORY", memory)
    model, done = ir.from_proto(shared), [0]

    def advance(units: int) -> None:
        done[0] += units

    def opened(copy: ir.Model) -> Any:
        return functools.partial(run_ort, ir.to_proto(copy))

    gather(model, groups_of(model), opened, texts(rng, 5), texts(rng, 2), None, advance)
    assert done == [7]


# --- masks


def fed(**arrays: Any) -> Feed:
    return {name: np.asarray(array) for name, array in arrays.items()}


def test_a_mask_is_found_by_name_and_shape() -> None:
    ids, ones = np.zeros((2, 3), np.int64), np.ones((2, 3))
    assert find_mask(fed(ids=ids, attention_mask=ones.astype(np.int64))) == "attention_mask"
    assert find_mask(fed(ids=ids, mask=ones.astype(np.float32))) == "mask"
    assert find_mask(fed(ids=ids, input_mask=ones.astype(bool))) == "input_mask"
    assert find_mask(fed(ids=ids, attention_mask=ones * -1e4)) is None  # added to the scores
    assert find_mask(fed(ids=ids, attention_mask=np.ones((2, 4)))) is None
    assert find_mask(fed(ids=ids, attention_mask=np.ones((2, 1, 1, 3)))) is None
    assert find_mask(fed(attention_mask=ones)) is None
    assert find_mask(fed(ids=ids, weights=ones)) is None


def test_wrong_masks(shared: onnx.ModelProto, rng: np.random.Generator) -> None:
    feeds = texts(rng, 3)
    with pytest.raises(InputError, match=r"--mask 'maks': expected one of .*attention_mask"):
        gathered(shared, feeds, mask="maks")
    empty = [{**feed, "attention_mask": 0 * feed["attention_mask"]} for feed in feeds]
    with pytest.raises(InputError, match="'attention_mask': masks all rows of all 3 samples"):
        gathered(shared, empty, mask="attention_mask")
    gathered(shared, [feeds[0], *empty[1:]], mask="attention_mask")
    shared.graph.input.append(onnx.helper.make_tensor_value_info("s", 1, [7]))
    more = [{**feed, "s": np.ones(7, np.float32)} for feed in feeds]
    with pytest.raises(InputError, match=r"--mask 's': its shape \[7\] fits no activation"):
        gathered(shared, more, mask="s")


def test_a_mask_that_was_only_found_may_fit_nothing(
    linear: onnx.ModelProto, rng: np.random.Generator
) -> None:
    linear.graph.node[0].input[0] = "turned"
    turn = onnx.helper.make_node("Transpose", ["x"], ["turned"], perm=[1, 0])
    linear.graph.node.insert(0, turn)
    feeds = [
        {"x": feed["x"].T.copy(), "mask": np.ones((32, 40), np.int64)} for feed in narrow(rng, 4)
    ]
    del linear.graph.input[:]
    for name, kind in (("x", 1), ("mask", 7)):
        linear.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, [32, 40]))
    factored(linear, rank=3, calibration=feeds)
    with pytest.raises(InputError, match="fits no activation"):
        factored(linear, rank=3, calibration=feeds, mask="mask")


# --- what is wrong with the activations


def test_nan_names_the_layer_and_the_sample(
    shared: onnx.ModelProto, rng: np.random.Generator
) -> None:
    feeds = texts(rng, 3)
    shared.graph.node[1].name = "query"
    bad = [feeds[0], {**feeds[1], "x": feeds[1]["x"] * np.nan}]
    with pytest.raises(InputError, match="the input of 'query' holds NaN or Inf in sample 1"):
        gathered(shared, bad)
    with pytest.raises(InputError, match="'query' holds NaN or Inf in held-out sample 1"):
        gathered(shared, feeds, held=bad)


def test_few_rows_are_said(shared: onnx.ModelProto, rng: np.random.Generator) -> None:
    feed = {"x": uniform((1, 3, 6), rng), "attention_mask": np.ones((1, 3), np.int64)}
    statistics, _, _ = gathered(shared, [feed])
    assert any("fewer rows than columns" in note for note in statistics.notes)
    assert not gathered(shared, texts(rng, 20))[0].notes


BRANCHES = f"""{HEAD} g (float[N, 8] x, bool flag) => (float[N, 8] y) {{
    h = MatMul(x, W)
    y = If(flag) <
        then_branch = a () => (float[N, 8] t) {{ t = MatMul(h, Wt) }},
        else_branch = b () => (float[N, 8] e) {{ e = Identity(h) }}
    >
}}"""


def test_a_layer_in_a_branch_falls_back(rng: np.random.Generator) -> None:
    proto = parse(BRANCHES, {"W": uniform((8, 8), rng), "Wt": uniform((8, 8), rng)})
    feeds = [{"x": uniform((9, 8), rng), "flag": np.array(False)} for _ in range(8)]
    result = factored(proto, rank=2, rank_multiple=1, calibration=feeds)
    made = result.report.calibration
    assert made is not None
    assert made.layers == 1
    assert list(made.missing.values()) == ["its activation is inside a subgraph or function"]
    assert any("fitted to its weight alone" in note for note in result.report.notes)
    assert all(layer.status == "factored" for layer in result.report.layers)


def test_a_layer_that_no_sample_reaches_falls_back(rng: np.random.Generator) -> None:
    proto = parse(
        f"""{HEAD} g (float[N, 8] x) => (float[K, 8] y) {{
            zero = Constant<value = float {{0.0}}>()
            sums = ReduceSum<keepdims=0>(x, axis)
            taken = Greater(sums, zero)
            rows = Compress<axis=0>(x, taken)
            y = MatMul(rows, W)
        }}""",
        {"W": uniform((8, 8), rng), "axis": np.array([1])},
    )
    feeds = [{"x": -np.ones((3, 8), np.float32)} for _ in range(4)]
    result = factored(proto, rank=2, calibration=feeds)
    assert result.report.calibration is not None
    assert list(result.report.calibration.missing.values()) == ["no sample reaches it"]


# --- through compress


def narrow(rng: np.random.Generator, count: int, rows: int = 40) -> list[Feed]:
    """Inputs that lie near a plane of 5 of 32 dimensions."""
    basis = np.random.default_rng(1).standard_normal((5, 32))
    return [
        {
            "x": (rng.standard_normal((rows, 5)) @ basis).astype(np.float32)
            + 0.01 * uniform((rows, 32), rng)
        }
        for _ in range(count)
    ]


@pytest.fixture
def linear(rng: np.random.Generator) -> onnx.ModelProto:
    return parse(
        f"{HEAD} g (float[N, 32] x) => (float[N, 24] y) {{ y = MatMul(x, W) }}",
        {"W": uniform((32, 24), rng)},
    )


def judged(result: Result, before: onnx.ModelProto, feeds: Sequence[Feed]) -> float:
    after = ir.to_proto(result.model)
    return float(
        np.mean([distance(run_ort(after, f)["y"], run_ort(before, f)["y"]) for f in feeds])
    )


def test_a_calibrated_result_is_closer(linear: onnx.ModelProto, rng: np.random.Generator) -> None:
    feeds, others = narrow(rng, 20), narrow(rng, 4)
    plain = factored(linear, rank=6)
    fitted = factored(linear, rank=6, calibration=feeds)
    assert judged(fitted, linear, others) < 0.1 * judged(plain, linear, others)
    (layer,) = fitted.report.layers
    assert layer.output_error == pytest.approx(judged(fitted, linear, others), rel=0.3)


def test_the_report_says_what_the_energy_is(
    linear: onnx.ModelProto, rng: np.random.Generator
) -> None:
    result = factored(linear, energy=0.99, rank_multiple=1, calibration=narrow(rng, 20))
    (layer,) = result.report.layers
    assert layer.energy_of == "output"
    assert layer.rank is not None
    assert layer.rank <= 5
    assert layer.energy is not None
    assert layer.energy >= 0.99
    assert layer.predicted_error == pytest.approx(np.sqrt(1 - layer.energy))
    assert layer.output_error == pytest.approx(layer.predicted_error, rel=0.3)
    made = result.report.calibration
    assert made is not None
    assert (made.data, made.samples, made.held_out) == ("a list of feeds", 15, 5)
    assert (made.mask, made.layers, made.missing) == (None, 1, {})
    assert result.report.to_dict()["calibration"]["samples"] == 15
    plain = factored(linear, energy=0.99, rank_multiple=1)
    (layer,) = plain.report.layers
    assert (layer.energy_of, layer.predicted_error, plain.report.calibration) == (
        "weight",
        None,
        None,
    )


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: Sequence[Feed]) -> None:
        self.feeds = iter(feeds)

    def get_next(self) -> Feed | None:
        return next(self.feeds, None)


def written(folder: Path, feeds: Sequence[Feed]) -> Path:
    folder.mkdir()
    for index, feed in enumerate(feeds):
        np.savez(folder / f"{index:03}.npz", **feed)
    return folder


def test_every_kind_of_source_gives_the_same(
    linear: onnx.ModelProto,
    rng: np.random.Generator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    feeds = narrow(rng, 8, rows=1)
    folder = written(tmp_path / "feeds", feeds)
    stack = tmp_path / "stack.npz"
    np.savez(stack, x=np.concatenate([feed["x"] for feed in feeds]))
    code = (
        "import numpy as np\nfrom pathlib import Path\n"
        f"def feeds():\n    for p in sorted(Path({str(folder)!r}).glob('*.npz')):\n"
        "        yield dict(np.load(p))\n"
    )
    (tmp_path / "calibration_feeds.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    sources: list[Any] = [
        feeds,
        folder,
        str(stack),
        iter(feeds),
        (feed for feed in feeds),
        Reader(feeds),
        f"{tmp_path}/calibration_feeds.py:feeds",
        "calibration_feeds:feeds",
    ]
    results = [factored(linear, rank=3, dims={"N": 1}, calibration=source) for source in sources]
    sys.modules.pop("calibration_feeds", None)
    assert sys.path == before
    for result in results:
        made = result.report.calibration
        assert made is not None
        assert (made.samples, made.held_out) == (6, 2)
        for name, value in results[0].model.graph.initializers.items():
            other = result.model.graph.initializers[name].const_value
            assert value.const_value is not None
            assert other is not None
            np.testing.assert_array_equal(value.const_value.numpy(), other.numpy())


CODE = """
import numpy as np
def late():
    yield {"x": np.zeros((1, 32), np.float32)}
    raise ValueError("two\\nlines")
def early(): raise KeyError("gone")
def leaves(): raise SystemExit(3)
def number(): return 5
def nothing(): return []
def one(): return {"x": np.zeros((1, 32), np.float32)}
def wrong(): return [{"z": np.zeros((1, 32), np.float32)}]
def wide(): return [{"x": np.zeros((1, 33), np.float32)}]
def text(): return [{"x": np.array([["a"]])}]
several = []
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("late", "ValueError: two lines$"),
        ("early", "KeyError: 'gone'$"),
        ("leaves", "SystemExit: 3$"),
        ("number", "expected an iterable of feeds or a CalibrationDataReader, came int"),
        ("nothing", "expected at least one sample, came none"),
        ("one", "expected a mapping from input names to arrays, came str"),
        ("wrong", r"sample 0: expected arrays \[x\], came \[z\]"),
        ("wide", r"sample 0: input 'x': axis 1 is fixed to 32 in the model, came 33"),
        ("text", "sample 0: input 'x': expected float32, came <U1"),
        ("several", "TypeError: 'list' object is not callable"),
        ("absent", "AttributeError: .* has no attribute 'absent'"),
    ],
)
def test_what_a_callable_does_wrong_is_one_line(
    name: str, message: str, linear: onnx.ModelProto, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(CODE)
    with pytest.raises(InputError, match=message) as caught:
        factored(linear, rank=3, calibration=f"{tmp_path}/own.py:{name}")
    assert "\n" not in str(caught.value)
    assert "own.py" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent.py:feeds", "no such file absent.py"),
        ("no.such.module:feeds", "ModuleNotFoundError: No module named 'no'"),
        ("absent.npz", "--calibrate absent.npz: no such file or folder"),
    ],
)
def test_sources_that_are_not_there(source: str, message: str, linear: onnx.ModelProto) -> None:
    with pytest.raises(InputError, match=message):
        factored(linear, rank=3, calibration=source)


# --- which samples calibrate, which judge


def seen(model: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """The report, and the first element of each sample that was fitted to, and that judged."""
    parts: list[list[float]] = []

    def spy(*arguments: Any, **options: Any) -> Any:
        parts.extend([float(feed["x"].flat[0]) for feed in part] for part in arguments[3:5])
        return gather(*arguments, **options)

    monkeypatch.setattr("onnx_lowrank.prepare.gather", spy)
    report = factored(model, rank=3, dims={"N": 1}, **options).report
    return report, parts


@pytest.fixture
def numbered(tmp_path: Path, rng: np.random.Generator) -> Path:
    x = uniform((40, 32), rng)
    x[:, 0] = np.arange(40)
    np.savez(tmp_path / "data.npz", x=x)
    return tmp_path / "data.npz"


def test_data_alone_serve_both(
    linear: onnx.ModelProto, numbered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, (fit, held) = seen(linear, monkeypatch, data=numbered, samples=8)
    assert (len(fit), len(held)) == (32, 8)
    assert not set(fit) & set(held)
    assert any("32 samples calibrate, 8 others judge" in note for note in report.notes)
    again = seen(linear, monkeypatch, data=numbered, samples=8)[1]
    assert again == [fit, held]


def test_the_same_file_twice_is_split(
    linear: onnx.ModelProto, numbered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(numbered.parent)
    _, (fit, held) = seen(linear, monkeypatch, data=numbered, calibration="data.npz")
    assert not set(fit) & set(held)
    assert len(fit) + len(held) == 40


def test_calibrate_alone_is_split(
    linear: onnx.ModelProto, numbered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (fit, held) = seen(linear, monkeypatch, calibration=numbered, calibration_samples=10)
    assert not set(fit) & set(held)
    assert len(fit) == 10


def test_both_are_taken_as_they_are(
    linear: onnx.ModelProto,
    numbered: Path,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    feeds = [{"x": np.full((1, 32), -number, np.float32)} for number in range(1, 6)]
    report, (fit, held) = seen(linear, monkeypatch, data=numbered, calibration=feeds, samples=4)
    assert fit == [-1, -2, -3, -4, -5]
    assert len(held) == 4
    assert min(held) >= 0
    assert report.calibration.data == "a list of feeds"


def test_one_sample(linear: onnx.ModelProto, tmp_path: Path, rng: np.random.Generator) -> None:
    np.savez(tmp_path / "one.npz", x=uniform((1, 32), rng))
    options: dict[str, Any] = {"rank": 3, "dims": {"N": 1}}
    report = factored(linear, data=tmp_path / "one.npz", **options).report
    assert report.calibration is None
    assert any("it judges" in note for note in report.notes)
    report = factored(linear, calibration=tmp_path / "one.npz", **options).report
    assert report.calibration is not None
    assert any("the check is too good" in note for note in report.notes)


def test_no_calibrate(linear: onnx.ModelProto, numbered: Path) -> None:
    report = factored(linear, rank=3, dims={"N": 1}, data=numbered, calibrate=False).report
    assert report.calibration is None
    with pytest.raises(UsageError, match="exclude each other"):
        factored(linear, calibration=numbered, calibrate=False)


def test_lengths_may_differ(shared: onnx.ModelProto, rng: np.random.Generator) -> None:
    result = factored(shared, rank=2, calibration=texts(rng, 12), check=True)
    made = result.report.calibration
    assert made is not None
    assert (made.layers, made.mask) == (4, "attention_mask")
    assert any("'attention_mask' is 0 are left out" in note for note in result.report.notes)


# --- statistics in a file


def initializers(result: Result) -> Iterator[tuple[str, Array]]:
    for name, value in result.model.graph.initializers.items():
        assert value.const_value is not None
        yield name, value.const_value.numpy()


def test_loaded_statistics_give_the_same(
    shared: onnx.ModelProto,
    rng: np.random.Generator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "moments.npz"
    feeds = texts(rng, 12)
    first = factored(shared, rank=2, calibration=feeds, save_stats=path)
    assert [item.name for item in tmp_path.iterdir()] == ["moments.npz"]

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("samples were run")

    monkeypatch.setattr("onnx_lowrank.prepare.gather", refuse)
    second = factored(shared, rank=2, load_stats=path)
    for (name, one), (other, two) in itertools.zip_longest(
        initializers(first), initializers(second)
    ):
        assert name == other
        np.testing.assert_array_equal(one, two)
    assert second.report.layers == first.report.layers
    assert first.report.calibration == second.report.calibration
    assert any("moments of 9 samples" in note for note in second.report.notes)
    third = factored(shared, energy=0.5, rank_multiple=1, load_stats=path)
    (*_, layer) = [layer for layer in third.report.layers if layer.status == "factored"]
    assert layer.energy_of == "output"


def test_statistics_of_tokens_and_slices(rng: np.random.Generator, tmp_path: Path) -> None:
    proto = parse(
        f"{HEAD} g (int64[3, 4] ids) => (float[3, 4, 8] y) {{"
        "x = Gather(E, ids) y = MatMul(x, W) }",
        {"E": uniform((20, 8), rng), "W": uniform((3, 8, 8), rng)},
    )
    feeds = [{"ids": rng.integers(0, 20, (3, 4))} for _ in range(6)]
    options: dict[str, Any] = {"rank": 2, "ops": ("all",)}
    path = tmp_path / "moments.npz"
    first = factored(proto, calibration=feeds, save_stats=path, **options)
    second = factored(proto, load_stats=path, **options)
    assert [layer.slices for layer in first.report.layers] == [1, 3]
    assert dict(initializers(first)).keys() == dict(initializers(second)).keys()
    for (_, one), (_, two) in zip(initializers(first), initializers(second), strict=True):
        np.testing.assert_array_equal(one, two)


def test_statistics_of_another_model(
    linear: onnx.ModelProto, rng: np.random.Generator, tmp_path: Path
) -> None:
    path = tmp_path / "moments.npz"
    onnx.save(linear, tmp_path / "one.onnx")
    factored(tmp_path / "one.onnx", rank=3, calibration=narrow(rng, 4), save_stats=path)
    other = onnx.ModelProto()
    other.CopyFrom(linear)
    trained = np.array(onnx.numpy_helper.to_array(linear.graph.initializer[0])) * 1.5
    other.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(trained, "W"))
    onnx.save(other, tmp_path / "two.onnx")
    with pytest.raises(InputError, match=r"belongs to another model, .*one\.onnx.*two\.onnx"):
        factored(tmp_path / "two.onnx", rank=3, load_stats=path)


def test_layers_that_the_file_does_not_hold(
    shared: onnx.ModelProto, rng: np.random.Generator, tmp_path: Path
) -> None:
    for index, node in enumerate(shared.graph.node):
        node.name = f"{node.op_type}-{index}"
    path = tmp_path / "moments.npz"
    factored(shared, rank=2, include=("MatMul*",), calibration=texts(rng, 12), save_stats=path)
    made = factored(shared, rank=2, load_stats=path).report.calibration
    assert made is not None
    assert list(made.missing) == ["Gemm-6"]
    assert "do not hold" in made.missing["Gemm-6"]


def test_files_that_are_no_statistics(linear: onnx.ModelProto, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        factored(linear, rank=3, load_stats=tmp_path / "absent.npz")
    (tmp_path / "text.npz").write_text("text")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.savez(tmp_path / "objects.npz", header=np.array([{}], object))
    for name in ("text", "other", "objects"):
        with pytest.raises(InputError, match="expected statistics that --save-stats wrote"):
            factored(linear, rank=3, load_stats=tmp_path / f"{name}.npz")


def test_where_statistics_cannot_go(
    linear: onnx.ModelProto, rng: np.random.Generator, tmp_path: Path
) -> None:
    onnx.save(linear, tmp_path / "one.onnx")
    options: dict[str, Any] = {"rank": 3, "calibration": narrow(rng, 4)}
    for path, message in (
        (tmp_path / "no" / "moments.npz", "does not exist"),
        (tmp_path, "cannot be written"),
        (tmp_path / "one.onnx", "would overwrite the input"),
    ):
        with pytest.raises(InputError, match=message):
            factored(tmp_path / "one.onnx", save_stats=path, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"load_stats": "a", "save_stats": "b", "data": "c"},
        {"load_stats": "a", "calibration": "b"},
        {"load_stats": "a", "calibrate": False},
        {"save_stats": "a"},
        {"save_stats": "a", "data": "b", "calibrate": False},
    ],
)
def test_options_that_exclude_each_other(
    linear: onnx.ModelProto, options: Mapping[str, Any]
) -> None:
    with pytest.raises(UsageError, match=r"--(load|save)-stats"):
        factored(linear, rank=3, **options)


def test_the_fingerprint_knows_names_shapes_and_elements(linear: onnx.ModelProto) -> None:
    def of(change: Any) -> str:
        proto = onnx.ModelProto()
        proto.CopyFrom(linear)
        array = np.array(onnx.numpy_helper.to_array(proto.graph.initializer[0]))
        name, array = change("W", array)
        proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(array, name))
        return fingerprint(ir.from_proto(proto))

    same = of(lambda name, array: (name, array))
    assert same == fingerprint(ir.from_proto(linear))
    others = [
        of(lambda name, array: ("V", array)),
        of(lambda name, array: (name, array.T)),
        of(lambda name, array: (name, array.astype(np.float64))),
        of(lambda name, array: (name, array + 1)),
    ]
    assert len({same, *others}) == 5


# --- a real model


@pytest.mark.slow
@pytest.mark.skipif(not MINILM.exists(), reason="models/cache/minilm-l6.onnx is not there")
def test_a_sentence_encoder_keeps_its_meaning() -> None:
    options: dict[str, Any] = {
        "keep": 0.8,
        "uniform": True,  # ranks chosen by measured damage would hide the difference
        "data": MINILM.with_suffix(".data.npz"),
        "samples": 64,
        "bench": False,
    }
    fitted, plain = (compress(MINILM, calibrate=value, **options).report for value in (True, False))
    assert fitted.totals == dataclasses.replace(plain.totals)
    cosines = [r.check.providers[0].outputs[0].cosine for r in (fitted, plain) if r.check]
    assert cosines[0] >= 0.85
    assert cosines[1] < 0.75
    ratios = [
        layer.output_error / layer.predicted_error
        for layer in fitted.layers
        if layer.output_error is not None and layer.predicted_error is not None
    ]
    assert len(ratios) == 36
    assert 0.7 < np.median(ratios) < 1.5, ratios  # single layers are further off
