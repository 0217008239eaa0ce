"""Integers in blocks: rounding, GPTQ, corrections and pairs made for them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest
from onnx.reference import ReferenceEvaluator

from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.blocks import Bits, Blocks, levels, pack4, round_blocks, unpack4
from onnx_lowrank.numerics.code_descent import descended
from onnx_lowrank.numerics.correction import corrected, felt_error
from onnx_lowrank.numerics.fisher import Fisher
from onnx_lowrank.numerics.gptq import gptq
from onnx_lowrank.numerics.moments import Accumulator, Moments
from onnx_lowrank.numerics.output_pca import output_pair
from onnx_lowrank.numerics.quantized_pair import (
    refitted_second,
    rounded,
    rounded_second,
)


def moments_of(rows: Array) -> Moments:
    adding = Accumulator(int(rows.shape[1]))
    adding.add(rows)
    found = adding.moments()
    assert found is not None
    return found


def correlated(rng: np.random.Generator, count: int, size: int) -> Array:
    """Rows with a covariance that falls steeply, in no direction of an axis."""
    basis = np.linalg.qr(rng.standard_normal((size, size)))[0]
    return np.asarray(rng.standard_normal((count, size)) * np.exp(-np.arange(size) / 10) @ basis)


def dequantized(blocks: Blocks) -> Array:
    """What `onnx.reference` makes of the codes."""
    kind: int = {
        (4, True): onnx.TensorProto.INT4,
        (4, False): onnx.TensorProto.UINT4,
        (8, True): onnx.TensorProto.INT8,
        (8, False): onnx.TensorProto.UINT8,
    }[blocks.bits, blocks.zeros is None]

    def constant(array: Array, name: str) -> onnx.TensorProto:
        raw = pack4(array) if blocks.bits == 4 else array
        return onnx.helper.make_tensor(name, kind, array.shape, raw.tobytes(), raw=True)

    scales = blocks.scales.astype(np.float32)
    weights = [constant(blocks.codes, "q"), onnx.numpy_helper.from_array(scales, "s")]
    inputs = ["q", "s"]
    if blocks.zeros is not None:
        weights.append(constant(blocks.zeros, "z"))
        inputs.append("z")
    node = onnx.helper.make_node("DequantizeLinear", inputs, ["y"], axis=0, block_size=blocks.block)
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, blocks.shape)
    graph = onnx.helper.make_graph([node], "g", [], [output], weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    (found,) = ReferenceEvaluator(model).run(None, {})
    return np.asarray(found)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(64, 5), (32, 1)])
def test_values_are_those_of_dequantize_linear(
    bits: Bits, symmetric: bool, shape: tuple[int, int], rng: np.random.Generator
) -> None:
    blocks = round_blocks(rng.standard_normal(shape), bits, 16, symmetric=symmetric)
    np.testing.assert_array_equal(blocks.values(), dequantized(blocks))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "limit"), [(4, 0.12), (8, 0.006)])
@pytest.mark.parametrize("rows", [7, 32, 75])
def test_rounding_is_as_close_as_its_levels(
    bits: Bits, limit: float, rows: int, symmetric: bool, rng: np.random.Generator
) -> None:
    """Also where the rows are no multiple of the block, or fewer."""
    matrix = rng.standard_normal((rows, 40)) * np.exp(rng.standard_normal((1, 40)))
    blocks = round_blocks(matrix, bits, 32, symmetric=symmetric)
    assert blocks.shape == matrix.shape
    assert blocks.block == min(rows, 32)
    assert np.linalg.norm(blocks.values() - matrix) < limit * np.linalg.norm(matrix)
    levels = 1 << bits
    assert int(blocks.codes.max()) - int(blocks.codes.min()) < levels


def test_smaller_blocks_and_clips_lose_less(rng: np.random.Generator) -> None:
    matrix = rng.standard_t(4, (256, 64))
    lost = [
        np.linalg.norm(round_blocks(matrix, 4, block).values() - matrix) for block in (256, 64, 16)
    ]
    assert lost[0] > lost[1] > lost[2]
    largest = np.abs(matrix).reshape(4, 64, 64).max(axis=1)
    scale = np.repeat(largest / 7.5, 64, axis=0)
    whole = np.clip(np.rint(matrix / scale), -8, 7) * scale
    assert lost[1] < 0.97 * np.linalg.norm(whole - matrix)


def test_rows_that_count_more_are_closer(rng: np.random.Generator) -> None:
    matrix = rng.standard_t(3, (64, 200))
    weights = np.where(np.arange(64) % 8 == 0, 100.0, 0.1)
    plain = round_blocks(matrix, 4, 32).values() - matrix
    weighed = round_blocks(matrix, 4, 32, weights=weights).values() - matrix
    assert weights @ (weighed**2).sum(axis=1) < 0.9 * (weights @ (plain**2).sum(axis=1))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-7, 1e30])
@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_and_extreme_scales(scale: float, symmetric: bool, rng: np.random.Generator) -> None:
    matrix = scale * rng.standard_normal((32, 3))
    matrix[:, 1] = 0.0
    blocks = round_blocks(matrix, 4, 16, symmetric=symmetric)
    assert (blocks.scales > 0).all()
    assert not blocks.values()[:, 1].any()
    # What kernels round of sums of codes is scaled by it, in an output that is zero.
    assert (blocks.scales[:, 1] <= min(2.0**-14, blocks.scales[:, 0].max())).all()
    assert np.linalg.norm(blocks.values() - matrix) <= 0.15 * np.linalg.norm(matrix)


@pytest.mark.parametrize("count", [6, 7])
@pytest.mark.parametrize("signed", [True, False])
def test_packing_is_that_of_onnx(count: int, signed: bool, rng: np.random.Generator) -> None:
    low = -8 if signed else 0
    codes = rng.integers(low, low + 16, count).astype(np.int8 if signed else np.uint8)
    packed = pack4(codes)
    kind = onnx.TensorProto.INT4 if signed else onnx.TensorProto.UINT4
    tensor = onnx.helper.make_tensor("x", kind, [count], packed.tobytes(), raw=True)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor).astype(int), codes)
    np.testing.assert_array_equal(unpack4(packed, (count,), signed=signed), codes)


def test_one_scale_for_all(rng: np.random.Generator) -> None:
    matrix = (rng.standard_normal((96, 40)) * np.linspace(0.1, 1.0, 40)).astype(np.float32)
    rows = np.linspace(1.0, 3.0, 96)
    moments = Moments(np.diag(rows), np.zeros(96), 500)
    each = round_blocks(matrix, 8, 96, weights=rows)
    for found in (
        round_blocks(matrix, 8, 96, weights=rows, one=True),
        gptq(matrix, moments, 8, 96, one=True),
    ):
        assert found.shape == (96, 40)
        assert found.scales.shape == (1, 40)
        assert len(np.unique(found.scales)) == 1
        step = float(found.scales[0, 0])
        assert np.abs(found.values() - matrix).mean() < step
        assert np.abs(found.values() - matrix).max() > np.abs(each.values() - matrix).max()
        assert found.block == 96


def test_no_matrix_no_blocks() -> None:
    for shape, block in (((0, 4), 16), ((4, 0), 16), ((4, 4), 0)):
        with pytest.raises(ValueError, match="expected a matrix and a block"):
            round_blocks(np.zeros(shape), 4, block)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_loses_far_less_of_the_outputs(symmetric: bool, rng: np.random.Generator) -> None:
    """And that it does so by C: with another C it loses more."""
    matrix, rows = rng.standard_normal((200, 80)), correlated(rng, 3000, 200)
    own = moments_of(rows)
    other = moments_of(correlated(np.random.default_rng(9), 3000, 200))

    def lost(blocks: Blocks) -> float:
        return felt_error(matrix - blocks.values(), own)

    plain = lost(round_blocks(matrix, 4, 32, symmetric=symmetric))
    assert lost(gptq(matrix, own, 4, 32, symmetric=symmetric)) < 0.3 * plain
    assert lost(gptq(matrix, other, 4, 32, symmetric=symmetric)) > 0.8 * plain


def test_gptq_of_inputs_apart_is_rounding_to_nearest(rng: np.random.Generator) -> None:
    matrix = rng.standard_normal((64, 10))
    plain = round_blocks(matrix, 4, 16)
    found = gptq(matrix, Moments(np.ones(64), np.zeros(64), 9), 4, 16)
    np.testing.assert_array_equal(found.codes, plain.codes)
    white = gptq(matrix, Moments(np.eye(64), np.zeros(64), 9), 4, 16)  # its scales are fitted
    assert np.abs(white.codes - plain.codes).max() <= 1
    before = np.square(plain.values() - matrix).sum(axis=0)
    assert (np.square(white.values() - matrix).sum(axis=0) <= before * (1 + 1e-5)).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "block"), [(4, 16), (4, 48), (8, 200)])
def test_codes_given_all_others_lose_less(
    bits: Bits, block: int, symmetric: bool, rng: np.random.Generator
) -> None:
    """The last block is not full; an input is always 0, and one output too."""
    matrix = rng.standard_normal((200, 30))
    matrix[:, 3] = 0.0
    rows = correlated(rng, 3000, 200)
    rows[:, 7] = 0.0
    second = moments_of(rows).second
    plain = round_blocks(matrix, bits, block, symmetric=symmetric)
    found = descended(matrix, second, plain)

    def lost(blocks: Blocks) -> npt.NDArray[np.float64]:
        off = matrix - blocks.values()
        return np.asarray((off * (second @ off)).sum(axis=0))

    assert lost(found).sum() < 0.8 * lost(plain).sum()
    assert (lost(found) <= lost(plain) * (1 + 1e-3) + 1e-9).all()
    assert found.codes.dtype == plain.codes.dtype
    assert found.scales.dtype == plain.scales.dtype
    assert (found.scales > 0).all()
    least, most = levels(bits, symmetric)
    assert least <= int(found.codes.min())
    assert int(found.codes.max()) <= most
    assert not found.values()[:, 3].any()
    again = descended(matrix, second, found)  # every column is by itself, and near its end
    assert lost(again).sum() > 0.8 * lost(found).sum()
    single = round_blocks(matrix, bits, 200, symmetric=symmetric, one=True)
    same = descended(matrix, second, single, one=True)
    assert len(np.unique(same.scales)) == 1
    assert lost(same).sum() < lost(single).sum()


def test_gptq_with_singular_moments(rng: np.random.Generator) -> None:
    rows = rng.standard_normal((100, 5)) @ rng.standard_normal((5, 60))
    rows[:, 7] = 0.0
    matrix, own = rng.standard_normal((60, 20)), moments_of(rows)
    found = gptq(matrix, own, 4, 32)
    plain = round_blocks(matrix, 4, 32)
    before = felt_error(matrix - plain.values(), own)
    assert felt_error(matrix - found.values(), own) < 0.2 * before
    nothing = Moments(np.zeros((60, 60)), np.zeros(60), 5)
    np.testing.assert_array_equal(gptq(matrix, nothing, 4, 32).codes, plain.codes)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e20, 1e37])
def test_gptq_does_not_depend_on_the_scale(
    scale: float, one: bool, rng: np.random.Generator
) -> None:
    """Neither of the weight nor of the inputs, though squares leave the range of float32."""
    matrix = rng.standard_normal((96, 20)).astype(np.float32)
    own = moments_of(correlated(rng, 2000, 96))
    lost = felt_error(matrix - gptq(matrix, own, 4, 32, one=one).values(), own)
    large = (matrix.astype(np.float64) * scale).astype(np.float32)
    found = gptq(large, own, 4, 32, one=one).values().astype(np.float64)
    assert felt_error(matrix - found / scale, own) < 1.05 * lost
    far = Moments(own.second * scale**2, own.mean * scale, own.rows)
    found = gptq(matrix, far, 4, 32, one=one).values().astype(np.float64)
    assert felt_error(matrix - found, own) < 1.05 * lost


@pytest.mark.filterwarnings("error")
def test_gptq_of_columns_that_are_far_apart(rng: np.random.Generator) -> None:
    matrix = rng.standard_normal((96, 20)).astype(np.float32)
    own = moments_of(correlated(rng, 2000, 96))
    sizes = np.repeat([1e30, 1.0, 1e-25, 0.0], 5)
    far = (matrix * sizes).astype(np.float32)
    far[:32, 0] = 1e-10  # a block that counts nothing beside its column
    found = gptq(far, own, 4, 32).values().astype(np.float64)
    plain = gptq(matrix, own, 4, 32).values()
    for column in range(1, 15):
        off = matrix[:, [column]] - found[:, [column]] / sizes[column]
        before = felt_error(matrix[:, [column]] - plain[:, [column]], own)
        assert felt_error(off, own) < 1.3 * before
    assert not found[:, 15:].any()
    assert np.abs(found[:32, 0]).max() < 1e-12 * 1e30


@pytest.mark.parametrize("known", [True, False])
def test_a_correction_takes_what_the_outputs_feel(known: bool, rng: np.random.Generator) -> None:
    matrix, own = rng.standard_normal((120, 60)), moments_of(correlated(rng, 2000, 120))
    root = rng.standard_normal((60, 60))
    fisher = Fisher.of(root @ root.T, 10_000) if known else Fisher()

    def rounding(target: Array) -> Blocks:
        return gptq(target, own, 4, 32)

    alone = felt_error(matrix - rounding(matrix).values(), own, fisher)
    found = corrected(matrix, own, 8, rounding, fisher)
    assert found.first.shape, found.second.shape == ((120, 8), (8, 60))
    assert found.error == pytest.approx(felt_error(matrix - found.values(), own, fisher), rel=1e-3)
    assert found.error < 0.6 * alone
    # Once, without going back to the codes, it takes less.
    first, second = output_pair(fisher.into(matrix - rounding(matrix).values()), own, 8, np.float64)
    once = felt_error(matrix - rounding(matrix).values() - first @ fisher.back(second), own, fisher)
    assert found.error <= once * (1 + 1e-5)


def test_a_correction_without_samples(rng: np.random.Generator) -> None:
    matrix = rng.standard_normal((40, 30))
    found = corrected(matrix, None, 30, lambda target: round_blocks(target, 4, 16))
    assert found.error < 1e-6 * np.vdot(matrix, matrix)


@pytest.mark.parametrize("sampled", [True, False])
def test_a_pair_is_fitted_to_its_rounded_factor(sampled: bool, rng: np.random.Generator) -> None:
    matrix = rng.standard_normal((100, 70))
    own = moments_of(correlated(rng, 2000, 100)) if sampled else moments_of(np.eye(100))
    given = own if sampled else None
    first, second = output_pair(matrix, own, 24, np.float64)
    a = rounded(first, given, 4, 32)
    b = rounded_second(matrix, a.values(), second, given, 4, 32)
    whole = felt_error(matrix - first @ second, given)
    apart = round_blocks(first, 4, 32).values() @ round_blocks(second, 4, 32).values()
    added = felt_error(matrix - a.values() @ b.values(), given) - whole
    assert added < 0.9 * (felt_error(matrix - apart, given) - whole)
    np.testing.assert_allclose(
        refitted_second(matrix, first, second, given), second, atol=0.02 * np.abs(second).max()
    )
