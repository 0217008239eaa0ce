"""What the programs in tools/ and models/ import of the package is there.

Type checks do not tell: the package itself makes its names when they are asked for.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

from tests.helpers.places import ROOT

PROGRAMS = [path for folder in ("models", "tools") for path in sorted((ROOT / folder).glob("*.py"))]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_what_a_program_imports_is_there(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.level or node.module is None:
            continue
        if node.module.split(".")[0] != "onnx_lowrank":
            continue
        module = importlib.import_module(node.module)
        for alias in node.names:
            found = hasattr(module, alias.name)
            assert found, f"{path.name}: {node.module} has no {alias.name}"
