"""models/get.py: which models its options choose."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.helpers.places import ROOT

sys.path.insert(0, str(ROOT / "models"))

import get
from catalogue import MODELS


def asked_for(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[str]:
    """The models that a call obtains."""
    names: list[str] = []

    def obtain(name: str, cache: Path) -> Path:
        names.append(name)
        return cache / name

    monkeypatch.setattr(get, "obtain", obtain)
    assert get.main(arguments) == 0
    return names


def test_large_models_are_made_only_where_they_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    large = {model.name for model in MODELS if model.large}
    assert "smollm2" in large
    for every in ("--all", "--packages"):
        names = asked_for(monkeypatch, every)
        assert names
        assert not large.intersection(names)
    assert asked_for(monkeypatch, "--packages", "smollm2")[0] == "smollm2"


def test_what_a_model_is_made_of_is_a_model_too() -> None:
    known = {model.name for model in MODELS}
    needs = {name for model in MODELS for name in getattr(model.origin, "needs", ())}
    assert needs
    assert needs <= known
