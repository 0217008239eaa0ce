"""HTML that cannot be broken by what it shows: text is escaped, only what is made here is not.

Names of nodes come from models, which anybody may have written.
"""

from __future__ import annotations

import html
from collections.abc import Iterable

from onnx_lowrank.phrases import printable

__all__ = ["Html", "joined", "name", "tag"]


class Html(str):
    """A text that is HTML already."""

    __slots__ = ()


_VOID = frozenset({"br", "input", "meta"})
_SVG_VOID = frozenset({"circle", "line", "path", "rect"})


def tag(kind: str, *children: Html | str | None, **attributes: object) -> Html:
    """An element.  Children that are plain text are escaped, as are the values of attributes.

    Args:
        kind: such as "td".
        children: what is in it; None is left out.
        attributes: ``_`` stands for ``-`` and one at the end is dropped, so that ``class_`` and
            ``data_key`` can be written; None and False are left out, True has no value.
    """
    written = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        word = key.rstrip("_").replace("_", "-")
        text = "" if value is True else f'="{html.escape(printable(str(value)))}"'
        written.append(f" {word}{text}")
    start = f"<{kind}{''.join(written)}"
    if kind in _VOID:
        return Html(f"{start}>")
    if kind in _SVG_VOID and not children:
        return Html(f"{start}/>")
    inner = "".join(map(_child, children))
    return Html(f"{start}>{inner}</{kind}>")


def _child(child: Html | str | None) -> str:
    if child is None:
        return ""
    return child if isinstance(child, Html) else html.escape(printable(child), quote=False)


def joined(parts: Iterable[Html | str | None]) -> Html:
    """Elements and texts one after the other; texts are escaped."""
    return Html("".join(map(_child, parts)))


def name(text: str) -> Html:
    """A name from a model, apart from the direction of the text around it."""
    return tag("bdi", text, class_="name")
