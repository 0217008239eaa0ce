"""Shorten: texts in a few columns of a terminal, so that what differs still differs.

Of names such as ``/encoder/layer.0/attention/query/MatMul`` the words go first that nearly all of
them have, then the middle.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Container, Sequence

from rich.cells import cell_len

__all__ = ["GAP", "cut_names", "cut_text", "wrapped"]

GAP = "…"
_SEPARATORS = re.compile(r"([/.:]+)")
# A word that so large a share of the names have tells little.
_COMMON = 0.8
# How much of what stays of a name is its beginning: the first that tells all names apart.
_HEADS = (0.5, 0.6, 0.4, 0.7, 0.3, 0.75, 0.8, 0.85, 0.9, 0.2, 0.1, 0.0, 1.0)


def wrapped(text: str, width: int, hanging: int = 2) -> list[str]:
    """A text in lines that end between words; a longer word has a line of its own, whole.

    Args:
        text: one paragraph; blanks at its start stay.
        width: columns.
        hanging: blanks before every line but the first.
    """
    words = text.split(" ")
    lines, line = [], words[0]
    for word in words[1:]:
        longer = f"{line} {word}"
        if line.strip() and cell_len(longer) > width:
            lines.append(line.rstrip())
            line = f"{'':{hanging}}{word}"
        else:
            line = longer
    return [*lines, line.rstrip()]


def cut_text(text: str, width: int) -> str:
    """The beginning of a text, up to the end of a word, with a sign where it is cut."""
    if cell_len(text) <= width:
        return text
    head = _head(text, width - 1)
    if " " in head and not text[len(head)].isspace():
        head = head.rpartition(" ")[0]
    head = head.rstrip(" ,;:")
    return f"{head}{GAP}" if head else ""


def cut_names(names: Sequence[str], width: int) -> list[str]:
    """Names in so many columns each; those that differ differ still where that can be had.

    Args:
        names: of one table; all are treated alike.
        width: columns, at least 3.
    """
    if all(cell_len(name) <= width for name in names):
        return list(names)
    different = list(dict.fromkeys(names))
    short = dict(zip(different, _without_common(different), strict=True))
    cuts = [{name: _cut(short[name], width, head) for name in different} for head in _HEADS]
    best = max(cuts, key=lambda cut: len(set(cut.values())))
    return [best[name] for name in names]


def _without_common(names: Sequence[str]) -> list[str]:
    """Names without the words that nearly all have, where they stay different."""
    if len(names) < 2:
        return list(names)
    split = [_SEPARATORS.split(name) for name in names]
    words = [parts[::2] for parts in split]
    # As many words as all begin with, whatever they are; further in, words of some length.
    ahead = sum(
        1 for _ in itertools.takewhile(lambda own: len(set(own)) == 1, zip(*words, strict=False))
    )
    uses = Counter(word for own in words for word in set(own) if len(word) > 1)
    common = {word for word, count in uses.items() if count >= _COMMON * len(names)}
    found = [_elided(parts, ahead, common) for parts in split]
    return found if len(set(found)) == len(names) else list(names)


def _elided(parts: Sequence[str], ahead: int, common: Container[str]) -> str:
    """A name with one sign for each run of common words and the separators around it.

    Args:
        parts: words of the name, with a separator between every two.
        ahead: how many words at the start go.
        common: what goes further in.
    """
    text, hole = "", False
    for number, word in enumerate(parts[::2]):
        if (number < ahead and any(parts[: 2 * ahead : 2])) or word in common:
            hole = True
            continue
        text += GAP if hole else parts[2 * number - 1] if number else ""
        text += word
        hole = False
    text = text + GAP if hole else text
    return "".join(parts) if text == GAP else text


def _cut(name: str, width: int, head: float) -> str:
    if cell_len(name) <= width:
        return name
    left = round(head * (width - 1))
    first = _head(name, left)
    return f"{first}{GAP}{_head(name[::-1], width - 1 - cell_len(first))[::-1]}"


def _head(text: str, width: int) -> str:
    """As many characters from the start as fit."""
    end = min(len(text), max(width, 0))
    while cell_len(text[:end]) > width:
        end -= 1
    return text[:end]
