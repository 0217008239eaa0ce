"""What all tests share."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import settings

from tests.calibrated import attention, single

# A loaded machine must not fail a test, and no folder is left in the checkout.
settings.register_profile("onnx-lowrank", deadline=None, database=None, max_examples=60)
settings.load_profile("onnx-lowrank")


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
