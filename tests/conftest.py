"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import settings

from tests.helpers.calibrated import attention, single
from tests.helpers.commands import M, N, weight
from tests.helpers.models import linear_model, parse, uniform

# A loaded machine must not fail a test, and no folder is left in the checkout.
settings.register_profile("onnx-lowrank", deadline=None, database=None, max_examples=60)
settings.load_profile("onnx-lowrank")
# Nor may it make a run tell how far it is; tests of that set the seconds themselves.
os.environ["ONNX_LOWRANK_PROGRESS"] = "0"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def shared(rng: np.random.Generator) -> onnx.ModelProto:
    """Four maps, three of which read one activation."""
    return attention(rng)


@pytest.fixture
def linear(rng: np.random.Generator) -> onnx.ModelProto:
    """One map of 32 elements."""
    return single(rng)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """One linear layer whose weight has rank 8."""
    path = tmp_path / "in.onnx"
    onnx.save(linear_model(weight(), bias=uniform([N], np.random.default_rng(1))), path)
    return path


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Two layers, "encoder/fc" with the scopes of torch, and "head"."""
    model = parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        two (float[batch, {M}] x) => (float[batch, {M}] y) {{
            h = MatMul(x, W)
            y = MatMul(h, V)
        }}""",
        {"W": weight(), "V": weight(1, N, M)},
    )
    model.graph.node[0].name, model.graph.node[1].name = "encoder/fc", "head"
    entry = model.graph.node[0].metadata_props.add()
    entry.key, entry.value = "pkg.torch.onnx.name_scopes", "['', 'encoder', 'encoder.fc']"
    path = tmp_path / "two.onnx"
    onnx.save(model, path)
    return path
