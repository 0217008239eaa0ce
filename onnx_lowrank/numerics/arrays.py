"""Names for the types of arrays that all packages use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

__all__ = ["Array", "Feed"]

Array = npt.NDArray[Any]
"""An array of any shape and element type."""

Feed = Mapping[str, Array]
"""One sample, or the outputs of one: name of an input or output -> array."""
