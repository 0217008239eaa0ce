"""The frame of every page: the sentence first, sections, tables, and how to do it again."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from onnx_lowrank.phrases import size
from onnx_lowrank.reports.markup import Html, joined, name, tag
from onnx_lowrank.reports.texts import Sentence, count, file_name
from onnx_lowrank.schema.json_report import File, Origin

__all__ = ["again", "bar", "facts", "notes", "page", "section", "table", "tile"]

Cell = Html | str


def page(
    title: str, tool: str, sentence: Sentence, what: Html, sections: Iterable[Html | None]
) -> str:
    """A whole page, in one file that needs no network.

    A content security policy lets nothing run but the page's own script, whatever a model's names
    hold, and lets nothing be loaded.

    Args:
        title: of the window.
        tool: name and version of the program.
        sentence: how it went.
        what: what the page is about.
        sections: in their order; None is left out.
    """
    style, script = (
        files("onnx_lowrank.reports").joinpath(file).read_text(encoding="utf-8")
        for file in ("page.css", "page.js")
    )
    known = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{known}'; "
        "base-uri 'none'; form-action 'none'"
    )
    tone, text = sentence
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(style)),
    )
    body = tag(
        "body",
        tag(
            "header",
            tag("p", what, class_="what"),
            Html(tag("h1", text, class_=f"verdict {tone}").replace(" %", "&nbsp;%")),
        ),
        tag("main", joined(sections)),
        tag("footer", tool),
        tag("script", Html(script)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def section(title: str, *children: Html | None, lead: str = "") -> Html:
    """A section with a heading, and a sentence that says how to read it."""
    text = tag("p", lead, class_="lead") if lead else None
    return tag("section", tag("h2", title), text, joined(children))


def table(head: Sequence[str], rows: Iterable[Sequence[Cell]], *, text: Sequence[str] = ()) -> Html:
    """A plain table; on a narrow screen every row becomes a card.

    Args:
        head: the columns.
        rows: the cells.
        text: the columns that hold text; all others hold numbers and stand to the right.
    """
    kinds = ["text" if column in text else "number" for column in head]
    titles = [tag("th", column, class_=kind) for column, kind in zip(head, kinds, strict=True)]
    body = [
        tag(
            "tr",
            *(
                tag("td", cell, class_=kind, data_label=column)
                for column, kind, cell in zip(head, kinds, row, strict=True)
            ),
        )
        for row in rows
    ]
    return tag(
        "table", tag("thead", tag("tr", *titles)), tag("tbody", joined(body)), class_="cards"
    )


def bar(before: float, after: float, most: float) -> Html:
    """Two bars, one in the other: before, and what is left of it.

    Args:
        before: at least 0.
        after: at least 0.
        most: what fills the width.
    """

    def wide(value: float) -> str:
        return f"width:{100 * value / most if most else 0:.2f}%"

    return tag(
        "span",
        tag("span", class_="was", style=wide(before)),
        tag("span", class_="is", style=wide(after)),
        class_="bar",
    )


def tile(title: str, before: str, after: str, changed: str, bars: Html | None) -> Html:
    """A figure of the whole model before and after."""
    return tag(
        "div",
        tag("h3", title),
        tag("p", changed or "–", class_="big"),
        tag("p", f"{before} → {after}", class_="small"),
        bars,
        class_="tile",
    )


def facts(entries: Iterable[tuple[str, Cell]]) -> Html:
    """Names and what they are."""
    return tag("dl", joined(joined([tag("dt", key), tag("dd", value)]) for key, value in entries))


def notes(*kinds: tuple[str, Sequence[str]]) -> Html | None:
    """What else the user should know; None where there is nothing."""
    items = [
        tag("li", tag("b", f"{kind}: ") if kind != "note" else None, text)
        for kind, texts in kinds
        for text in texts
    ]
    return section("Notes", tag("ul", joined(items))) if items else None


def again(
    origin: Origin | None,
    models: Sequence[File],
    settings: Mapping[str, Any] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> Html:
    """The command, the models with their digests, versions, options and stages.

    Args:
        origin: the command and versions.
        models: the files that were read.
        settings: name of an option -> value.
        seconds: stage -> wall time.
    """
    parts: list[Html | None] = []
    if origin is not None:
        typed = origin.command or "part of this run was in memory: there is no command for it"
        parts.append(tag("pre", tag("code", typed), class_="command"))
    entries: list[tuple[str, Cell]] = []
    for file in models:
        known = f"SHA-256 {file.digest}" if file.digest else "no digest: it was in memory"
        about = f"{size(file.bytes)}, {count(file.parameters)} parameters, {known}"
        entries.append((file_name(file.path), about))
    if origin is not None:
        entries.append(("processor", origin.processor))
        versions = (f"{package} {number}" for package, number in origin.versions.items())
        entries.append(("versions", ", ".join(versions)))
    if seconds:
        stages = (f"{stage} {took:.2g} s" for stage, took in seconds.items())
        entries.append(("stages", ", ".join(stages)))
    parts.append(facts(entries))
    if settings:
        given = [(key, _value(value)) for key, value in settings.items() if value is not None]
        rows = facts((key, name(value)) for key, value in given if value)
        parts.append(tag("details", tag("summary", "Every option"), rows))
    return section("Run it again", *parts)


def _value(value: object) -> str:
    """A setting as text; "" for one that is empty."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_value(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)
