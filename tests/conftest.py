"""What all tests share."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings

# A loaded machine must not fail a test, and no folder is left in the checkout.
settings.register_profile("onnx-lowrank", deadline=None, database=None, max_examples=60)
settings.load_profile("onnx-lowrank")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)
