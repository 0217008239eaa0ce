"""Where things lie in the checkout."""

from __future__ import annotations

from pathlib import Path

__all__ = ["CACHE", "HELPERS", "ROOT"]

HELPERS = Path(__file__).resolve().parent
ROOT = HELPERS.parents[1]
CACHE = ROOT / "models" / "cache"
"""Models that ``models/get.py`` brings; tests of those that are not there skip."""
