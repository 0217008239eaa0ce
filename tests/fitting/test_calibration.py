"""Moments of what each layer multiplies, gathered over samples."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank.fitting import passes as module
from onnx_lowrank.fitting.gather import gather
from onnx_lowrank.fitting.statistics import statistics_of
from onnx_lowrank.fitting.streams import streams_of
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.runtime.memory import SHARE, Memory
from tests.helpers.calibrated import HEAD, gathered, groups_of, texts
from tests.helpers.models import (
    parse,
    run_ort,
    uniform,
)

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
    np.testing.assert_allclose(moments.second, rows.T @ rows / 10, rtol=1e-5, atol=1e-7)


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
    np.testing.assert_allclose(moments.second, rows.T @ rows / 8, rtol=1e-5, atol=1e-7)


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
    np.testing.assert_allclose(
        first["Wq"][0].second, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-7
    )
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

    found = gather(model, groups, opened, feeds, held, None, lambda _: None).whole
    assert sorted(name for name, _, _ in found) == ["one two", "three"]  # V reads three too
    statistics = statistics_of(model, groups, found)
    for samples, kind in ((feeds, statistics.fit), (held, statistics.held)):
        x = np.concatenate([feed["x"] for feed in samples]).astype(float)
        parts = {"W": [np.tanh(x), np.sin(x), np.cos(x)], "V": [np.cos(x)]}
        for group in groups:
            rows = np.concatenate(parts[group.matrix.name or ""])
            (moments,) = kind[group]
            assert moments.rows == len(rows)
            np.testing.assert_allclose(
                moments.second, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-7
            )


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
    np.testing.assert_allclose(moments.second, rows.T @ rows / count, rtol=1e-5, atol=1e-7)


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
    monkeypatch.setattr(module, "MEMORY", 100)
    two, passes, again = gathered(shared, feeds, held=held)
    assert [len(opened), len(passes)] == [1, 2]
    for group, other in zip(groups, again, strict=True):
        for a, b in ((one.fit, two.fit), (one.held, two.held)):
            np.testing.assert_array_equal(a[group][0].second, b[other][0].second)
            np.testing.assert_array_equal(a[group][0].mean, b[other][0].mean)


def test_moments_wait_in_a_file_where_the_users_limit_is_near(
    shared: onnx.ModelProto,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("onnx_lowrank.runtime.memory.held", lambda: 0)
    model = ir.from_proto(shared)
    groups = groups_of(model)
    streams = list(streams_of(model, groups)[0].values())
    whole = 2 * sum(stream.memory for stream in streams)
    ample, short = (int(times * whole / SHARE) for times in (1.1, 0.9))
    assert not module.too_large(whole, Memory(ample, given=True))
    assert module.too_large(whole, Memory(short, given=True))
    assert module.too_large(whole, Memory(short))
    assert not module.too_large(whole, Memory())
    feeds, held = texts(rng, 4), texts(rng, 2)

    def opened(copy: ir.Model) -> Any:
        return functools.partial(run_ort, ir.to_proto(copy))

    stored = list[str]()
    store = Spool.store

    def noted(self: Spool, array: Array, name: str) -> Any:
        stored.append(name)
        return store(self, array, name)

    monkeypatch.setattr(Spool, "store", noted)
    plain = gather(model, groups, opened, feeds, held, None, lambda _: None).whole
    assert not stored
    tight = Memory(10 * short, given=True, folder=tmp_path)
    monkeypatch.setattr("onnx_lowrank.runtime.memory.held", lambda: 9 * short)
    again = gather(model, groups, opened, feeds, held, None, lambda _: None, tight).whole
    assert stored
    for key, found in plain.items():
        both = (*found.fit, *found.held), (*again[key].fit, *again[key].held)
        for one, two in zip(*both, strict=True):
            assert one is not None
            assert two is not None
            np.testing.assert_allclose(one.second, two.second, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("memory", [100, 1 << 30])
def test_progress_adds_up_to_the_samples(
    memory: int, shared: onnx.ModelProto, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MEMORY", memory)
    model, done = ir.from_proto(shared), [0]

    def advance(units: int) -> None:
        done[0] += units

    def opened(copy: ir.Model) -> Any:
        return functools.partial(run_ort, ir.to_proto(copy))

    gather(model, groups_of(model), opened, texts(rng, 5), texts(rng, 2), None, advance)
    assert done == [7]
