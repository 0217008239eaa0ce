"""The ways in which a MatMul or a Gemm can have a constant of rank 4."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx
import onnx.defs

from onnx_lowrank.numerics.arrays import Array
from tests.helpers.models import (
    TEXT_TYPES,
    known_rank,
    parse,
    uniform,
)

RANK = 4


M, N = 16, 12


@dataclass(frozen=True)
class Case:
    """One node ``y = …(x, W)``."""

    node: str
    x: tuple[int | str, ...]
    y: tuple[int | str, ...]
    ops: tuple[str, ...]
    form: str
    batch: tuple[int, ...] = ()
    left: bool = False  # W is [N, M] then
    more: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def model(
        self, rng: np.random.Generator, dtype: npt.DTypeLike = np.float32, opset: int = 17
    ) -> onnx.ModelProto:
        rows, columns = (N, M) if self.left else (M, N)
        weight = known_rank(rows, columns, RANK, rng, dtype, batch=self.batch)
        kind = TEXT_TYPES[weight.dtype]
        x, y = (str(list(shape)).replace("'", "") for shape in (self.x, self.y))
        return parse(
            f"""<ir_version: 8, opset_import: ["": {opset}]>
            one ({kind}{x} x) => ({kind}{y} y) {{ {self.node} }}""",
            {
                "W": weight,
                **{name: uniform(shape, rng, dtype) for name, shape in self.more.items()},
            },
        )

    def feeds(
        self, rng: np.random.Generator, dtype: npt.DTypeLike = np.float32
    ) -> dict[str, Array]:
        shape = [5 if isinstance(size, str) else size for size in self.x]
        return {"x": uniform(shape, rng, dtype)}


TWO = ("MatMul", "MatMul")


MATMUL = {
    "right": Case("y = MatMul(x, W)", (3, M), (3, N), TWO, "matmul-right"),
    "right, dynamic": Case("y = MatMul(x, W)", ("B", M), ("B", N), TWO, "matmul-right"),
    "right, vector": Case("y = MatMul(x, W)", (M,), (N,), TWO, "matmul-right"),
    "right, 3-D": Case("y = MatMul(x, W)", ("B", 7, M), ("B", 7, N), TWO, "matmul-right"),
    "right, 4-D": Case("y = MatMul(x, W)", (2, 3, 7, M), (2, 3, 7, N), TWO, "matmul-right"),
    "right, batch": Case("y = MatMul(x, W)", (3, 7, M), (3, 7, N), TWO, "matmul-right", (3,)),
    "right, batch for one matrix": Case(
        "y = MatMul(x, W)", (7, M), (3, 7, N), TWO, "matmul-right", (3,)
    ),
    "right, batch that widens": Case(
        "y = MatMul(x, W)", (2, 1, 7, M), (2, 3, 7, N), TWO, "matmul-right", (3,)
    ),
    "right, 4-D batch": Case(
        "y = MatMul(x, W)", (2, 3, 7, M), (2, 3, 7, N), TWO, "matmul-right", (2, 3)
    ),
    "right, batch of one": Case("y = MatMul(x, W)", (7, M), (1, 7, N), TWO, "matmul-right", (1,)),
    "left": Case("y = MatMul(W, x)", (M, 3), (N, 3), TWO, "matmul-left", left=True),
    "left, vector": Case("y = MatMul(W, x)", (M,), (N,), TWO, "matmul-left", left=True),
    "left, 3-D": Case("y = MatMul(W, x)", ("B", M, 7), ("B", N, 7), TWO, "matmul-left", left=True),
    "left, batch": Case(
        "y = MatMul(W, x)", (3, M, 7), (3, N, 7), TWO, "matmul-left", (3,), left=True
    ),
    "left, batch for one matrix": Case(
        "y = MatMul(W, x)", (M, 7), (3, N, 7), TWO, "matmul-left", (3,), left=True
    ),
    "left, 4-D batch": Case(
        "y = MatMul(W, x)", (2, 3, M, 7), (2, 3, N, 7), TWO, "matmul-left", (2, 3), left=True
    ),
}


def gemm_cases() -> dict[str, Case]:
    rows = 5
    biases: dict[str, tuple[int, ...] | None] = {
        "no C": None,
        "scalar C": (),
        "C[1]": (1,),
        "C[N]": (N,),
        "C[M,1]": (rows, 1),
        "C[M,N]": (rows, N),
    }
    cases = {}
    for left, trans_a, trans_b, bias, scaled in itertools.product(
        (False, True), (0, 1), (0, 1), biases, (False, True)
    ):
        attributes = [f"transA = {trans_a}"] * trans_a + [f"transB = {trans_b}"] * trans_b
        attributes += ["alpha = 0.5", "beta = 2.0"] * scaled
        shape = biases[bias]
        side = ("W", "x") if left else ("x", "W")
        inputs = [*side, "C"] if shape is not None else [*side]
        attribute_text = f"<{', '.join(attributes)}>" if attributes else ""
        if left:  # y[N, rows] = W'[N, M] x'[M, rows]
            x = (rows, M) if trans_b else (M, rows)
            y = (N, rows)
            stored_left = not trans_a  # W is [N, M], or [M, N] to be transposed
            turn = trans_b
            if shape is not None:
                shape = {(N,): (rows,), (rows, 1): (N, 1), (rows, N): (N, rows)}.get(shape, shape)
        else:
            x = (M, rows) if trans_a else (rows, M)
            y = (rows, N)
            stored_left = bool(trans_b)
            turn = trans_a
        cases[
            f"{'left' if left else 'right'} transA={trans_a} transB={trans_b} {bias} "
            f"{'scaled' if scaled else 'plain'}"
        ] = Case(
            f"y = Gemm {attribute_text} ({', '.join(inputs)})",
            x,
            y,
            ("Transpose", "MatMul", "Gemm") if turn else ("MatMul", "Gemm"),
            "gemm-left" if left else "gemm-right",
            left=stored_left,
            more={} if shape is None else {"C": shape},
        )
    return cases


GEMM = gemm_cases()
