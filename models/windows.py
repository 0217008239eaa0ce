"""Windows of text for language models: docstrings of the standard library, cut into tokens."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

__all__ = ["LENGTH", "windows"]

LENGTH = 256
# Folders of the standard library that hold no docstrings of its own.
OTHERS = frozenset({"dist-packages", "idlelib", "lib2to3", "site-packages", "test", "tests"})


def texts(first: str, last: str) -> Iterator[str]:
    """The docstrings of each module of the standard library from letter to letter."""
    library = Path(os.__file__).parent
    for file in sorted(library.rglob("*.py")):
        parts = file.relative_to(library).parts
        if not first <= parts[0][0].lower() <= last or OTHERS.intersection(parts):
            continue
        found: dict[str, None] = {}
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
                text = ast.get_docstring(node) or ""
                if len(text) >= 80:
                    found[text] = None
        yield "\n\n".join(found)


def windows(
    tokenizer: Tokenizer, first: str, last: str, count: int
) -> dict[str, NDArray[np.int64]]:
    """The model's input of windows of LENGTH tokens of text, in a fixed random order.

    Args:
        tokenizer: of the model.
        first: letter that names of modules begin with.
        last: the last such letter.
        count: how many windows at most.
    """
    found = []
    for text in texts(first, last):
        ids = tokenizer.encode(text).ids
        found += [ids[at : at + LENGTH] for at in range(0, len(ids) - LENGTH + 1, LENGTH)]
    order = np.random.default_rng(0).permutation(len(found))[:count]
    return {"input_ids": np.array([found[place] for place in order], np.int64)}
