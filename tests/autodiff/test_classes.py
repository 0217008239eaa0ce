"""The loss of classes: a Kullback-Leibler divergence, and its slope."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from scipy.special import log_softmax

from onnx_lowrank.autodiff.gradient import Loss, differentiable, gradient_model, loss_model
from onnx_lowrank.numerics.arrays import Array, Feed
from tests.helpers.models import parse


def test_the_loss_of_classes_and_its_slope() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 6)).astype(np.float32)
    model = ir.from_proto(
        parse(
            """<ir_version: 8, opset_import: ["": 17]>
            m (float[2, 3, 4] x) => (float[2, 3, 6] y) { y = MatMul(x, W) }""",
            {"W": weight},
        )
    )
    base = differentiable(model, ["W"])
    found = gradient_model(base, ["y"], ["W"], {}, by_classes=["y"])
    x, target = rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 3, 6))
    keep = np.array([[1, 1, 0], [1, 0, 0]], np.float32)[..., None]
    names = Loss.of("y")
    feed: dict[str, Array] = {"x": x, names.target: target, names.weight: keep}

    def plain(w: Array) -> float:
        q, p = log_softmax(target, axis=-1), log_softmax(x @ w.astype(np.float64), axis=-1)
        return float((np.exp(q) * (q - p) * keep).sum())

    given = ran(found.model, {**feed, "W": weight})
    np.testing.assert_allclose(given[names.loss], plain(weight), rtol=1e-5)
    slope = np.empty_like(weight)
    for index in np.ndindex(*weight.shape):
        step = np.zeros(weight.shape)
        step[index] = 1e-5
        slope[index] = (plain(weight + step) - plain(weight - step)) / 2e-5
    np.testing.assert_allclose(given[found.outputs["W"]], slope, atol=1e-3)
    alone = ran(loss_model(base, ["y"], ["y"]), {**feed, "W": weight})
    np.testing.assert_allclose(alone[names.loss], given[names.loss], rtol=1e-6)


def ran(model: ir.Model, feed: Feed) -> Feed:
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    wanted = {name: array.astype(np.float32) for name, array in feed.items()}
    outputs = [output.name for output in session.get_outputs()]
    return dict(zip(outputs, session.run(outputs, wanted), strict=True))
