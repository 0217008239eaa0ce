"""Random input for lengths: the size of the axis that they name, where the model runs with it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank import compress
from onnx_lowrank.data.declared import InputSpec, input_specs
from onnx_lowrank.data.lengths import Length, lengths_of
from onnx_lowrank.data.runnable import runnable_shapes
from onnx_lowrank.data.shapes import concrete_shapes
from onnx_lowrank.numerics.arrays import Feed
from tests.helpers.models import parse

I64, F32 = np.dtype(np.int64), np.dtype(np.float32)
SOUND = InputSpec("audio_signal", F32, ("N", 80, "T"))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("length", ("N",)),
        ("audio_signal_len", ()),
        ("x_lens", ("N", 1)),
        ("inputLengths", (1,)),
        ("seqlens", (None,)),
    ],
)
def test_what_is_a_length(name: str, shape: tuple[int | str | None, ...]) -> None:
    specs = [SOUND, InputSpec(name, I64, shape)]
    shapes = concrete_shapes(specs, {}, {"T": 120}).shapes
    assert lengths_of(specs, shapes) == {name: Length("audio_signal", 2, 120)}


@pytest.mark.parametrize(
    "spec",
    [
        InputSpec("max_length", I64, (1,)),
        InputSpec("total_sequence_length", I64, ()),
        InputSpec("lens_model", F32, ("N",)),
        InputSpec("lengths", I64, ("N", "T")),
        InputSpec("silence", I64, ("N",)),
    ],
)
def test_what_is_none(spec: InputSpec) -> None:
    specs = [SOUND, spec]
    assert not lengths_of(specs, concrete_shapes(specs, {}, {}).shapes)


def test_the_input_that_it_is_named_after() -> None:
    """Two inputs of different lengths: names tell, or nothing does."""
    text = InputSpec("text", I64, ("N", "L"))
    specs = [SOUND, text, InputSpec("text_length", I64, ("N",)), InputSpec("lengths", I64, ("N",))]
    shapes = concrete_shapes(specs, {}, {"T": 120, "L": 30}).shapes
    assert lengths_of(specs, shapes) == {"text_length": Length("text", 1, 30)}


def encoder() -> onnx.ModelProto:
    """Zeros what is beyond the length of each sample, and normalizes by it."""
    rng = np.random.default_rng(0)
    return parse(
        """<ir_version: 8, opset_import: ["" : 18]>
        g (float[N,T,32] x, int64[N] x_lens) => (float[N,48] y) {
            size = Shape (x)
            t = Gather (size, one)
            t0 = Squeeze (t)
            places = Range (zero, t0, step)
            ends = Unsqueeze (x_lens, one)
            inside = Less (places, ends)
            cast = Cast <to = 1> (inside)
            rows = Unsqueeze (cast, two)
            h = MatMul (x, W)
            kept = Mul (h, rows)
            sum = ReduceSum <keepdims = 0> (kept, one)
            count = Cast <to = 1> (ends)
            y = Div (sum, count)
        }""",
        {
            **{"W": rng.standard_normal((32, 48)).astype(np.float32)},
            **{"one": np.array([1]), "two": np.array([2])},
            **{"zero": np.array(0), "step": np.array(1)},
        },
    )


def test_a_model_is_checked_with_its_length() -> None:
    result = compress(encoder(), rank=16, bench=False)
    (note,) = [note for note in result.report.notes if note.startswith("random input")]
    assert "x_lens always 64, the size of axis 1 of x" in note
    assert result.report.check is not None
    assert np.isfinite(result.report.check.providers[0].outputs[0].relative_l2)


def test_a_length_that_the_model_does_not_run_with_is_not_used() -> None:
    model = ir.from_proto(encoder())
    specs = input_specs(model)

    def runs(feed: Feed) -> bool:
        return bool((feed["x_lens"] < 2).all())

    found = runnable_shapes(runs, model, specs, {}, {}, lengths=True)
    assert not found.lengths
    assert "does not run with x_lens 64, the size of axis 1 of x" in found.notes[-1]
    taken = runnable_shapes(lambda _: True, model, specs, {}, {}, lengths=True)
    assert taken.lengths == {"x_lens": Length("x", 1, 64)}
    # Samples bring their own.
    assert not runnable_shapes(runs, model, specs, {}, {}).lengths
