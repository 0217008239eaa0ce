"""Write what is made from the table of the options.

    python3 tools/write_options.py [--check]

The table is ``onnx_lowrank/compression/options.py``.  Written are the fields of `Settings`, the
arguments of the public functions with their documentation, and ``docs/reference/options.md``.
With ``--check`` nothing is written, and the exit code says whether all of it is up to date.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from onnx_lowrank.compression.headings import GROUPS  # noqa: E402
from onnx_lowrank.compression.option import Option  # noqa: E402
from onnx_lowrank.compression.options import OPTIONS  # noqa: E402
from onnx_lowrank.compression.verbs import (  # noqa: E402
    BENCH,
    CHECK,
    COMPRESS,
    INSPECT,
    SETTINGS,
    SUPPORT,
    SWEEP,
    VERBS,
    Verb,
)

__all__ = ["main"]

_WIDTH = 100
_PACKAGE = ROOT / "onnx_lowrank" / "compression"
_REFERENCE = ROOT / "docs" / "reference" / "options.md"

# How a value is stored, where it differs from what a function takes.
_STORED = {
    "texts": "tuple[str, ...]",
    "paths": "tuple[str | os.PathLike[str], ...]",
    "list": "tuple[str, ...] | None",
    "shapes": "Mapping[str, tuple[int, ...]]",
    "dims": "Mapping[str, int]",
}


# Module -> the verbs whose functions stand there.
_FUNCTIONS = {
    "api.py": (COMPRESS, INSPECT),
    "judging.py": (CHECK, BENCH, SUPPORT),
    "sweep.py": (SWEEP,),
}


def written() -> dict[Path, str]:
    """Every file and what has to be in it."""
    functions = {}
    for name, verbs in _FUNCTIONS.items():
        source = (_PACKAGE / name).read_text(encoding="utf-8")
        for verb in verbs:
            source = _function(source, verb)
        functions[_PACKAGE / name] = source
    settings = (_PACKAGE / "settings.py").read_text(encoding="utf-8")
    return {
        **functions,
        _PACKAGE / "settings.py": _settings(settings),
        _REFERENCE: _reference(),
    }


def _settings(source: str) -> str:
    """The fields between the class's text and its first method."""
    lines = []
    for option in SETTINGS:
        kind, default = _STORED.get(option.kind, option.type), _literal(option.default)
        if option.kind in ("shapes", "dims"):
            default = "field(default_factory=dict)"
        lines.append(f"    {option.name}: {kind} = {default}")
    start = source.index('"""\n\n', source.index("class Settings:")) + len('"""\n\n')
    end = source.index("\n    def __post_init__", start)
    return source[:start] + "\n".join(lines) + "\n" + source[end:]


def _literal(value: object) -> str:
    return re.sub(r"'", '"', repr(value))


def _function(source: str, verb: Verb) -> str:
    """A module's text with the options of a verb in the function of its name."""
    tree = ast.parse(source)
    node = next(
        item for item in tree.body if isinstance(item, ast.FunctionDef) and item.name == verb.name
    )
    lines = source.split("\n")
    taken = {name for name, option in OPTIONS.items() if option.function}
    own = [arg for arg in node.args.kwonlyargs if arg.arg not in taken]
    given = [f"    {o.name}: {o.type} = {_literal(o.default)}," for o in verb.arguments]
    text = ast.get_docstring(node, clean=False) or ""
    docs = _documented(text, verb, _names(node), {arg.arg for arg in own})
    first = (
        next(n for n, line in enumerate(lines) if n >= node.lineno and line.startswith("    *")) + 1
    )
    after = own[0].lineno - 1
    doc = node.body[0]
    assert isinstance(doc, ast.Expr)
    assert doc.end_lineno is not None
    return "\n".join(
        [
            *lines[:first],
            *given,
            *lines[after : doc.lineno - 1],
            *f'    """{docs}"""'.split("\n"),
            *lines[doc.end_lineno :],
        ]
    )


def _documented(text: str, verb: Verb, positional: set[str], own: set[str]) -> str:
    """A docstring with the options between the other arguments of its ``Args``."""
    head, args, rest = text.partition("    Args:\n")
    body, blank, tail = rest.partition("\n\n")
    entries = re.split(r"\n(?=        \w)", body)
    named = {entry.strip().partition(":")[0]: entry for entry in entries}
    before = [entry for name, entry in named.items() if name not in own and name in positional]
    last = [entry for name, entry in named.items() if name in own]
    return head + args + "\n".join([*before, *map(_entry, verb.arguments), *last]) + blank + tail


def _names(node: ast.FunctionDef) -> set[str]:
    """The arguments that are no options: those without a name in a call."""
    found = [*node.args.posonlyargs, *node.args.args, node.args.vararg]
    return {arg.arg for arg in found if arg is not None}


def _entry(option: Option) -> str:
    help_text = re.sub("; repeatable|, separated by commas", "", option.text(_argument))
    off = "False: " if option.kind == "off" else ""
    text = f"{option.name}: {off}{help_text[0].lower()}{help_text[1:]}"
    text += f" {option.also}" if option.also else ""
    text += f" Default: {option.default_text(_argument)}." if option.shown else ""
    return "\n".join(
        textwrap.wrap(text, _WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 12)
    )


def _argument(name: str) -> str:
    """What a reference is called where functions are documented."""
    return {"IN": "the original", "OUT": "the result"}.get(name, f"``{name}``")


def _reference() -> str:
    """The reference page."""
    return "\n".join(_page()) + "\n"


def _page() -> Iterator[str]:
    yield "# Options"
    yield ""
    yield (
        "Every option of the command, and the argument of the Python functions that means the "
        "same. This page is written by `tools/write_options.py` from the table that both read."
    )
    for verb in VERBS:
        yield ""
        name = "" if verb is COMPRESS else f" {verb.name}"
        yield f"## onnx-lowrank{name}"
        yield ""
        yield verb.help
        yield ""
        yield f"```text\n{verb.example}\n```"
        groups = [group for group in GROUPS if any(o.group == group for o in verb.options)]
        for group in groups:
            if verb is COMPRESS:
                yield ""
                yield f"### {group}"
                yield ""
                yield f"```text\n{GROUPS[group]}\n```"
            if verb is COMPRESS or group == groups[0]:
                yield ""
                yield "| option | argument | values | default | |"
                yield "|---|---|---|---|---|"
            yield from _rows(option for option in verb.options if option.group == group)


def _rows(options: Iterable[Option]) -> Iterator[str]:
    for option in options:
        flag = " ".join(f"`{name}`" for name in (*option.aliases, option.option))
        argument = f"`{option.name}: {option.type}`" if option.function else ""
        values = option.expected or (f"`{option.metavar}`" if option.metavar else "")
        if option.kind in ("switch", "off"):
            values = ""
        default = option.default_text(_typed)
        cells = (flag, argument, values, default, " ".join([_help(option), option.also]).strip())
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _help(option: Option) -> str:
    return option.text(lambda name: _typed(name, "`")).replace("  ", " ")


def _typed(name: str, quote: str = "") -> str:
    return name if name in ("IN", "OUT") else f"{quote}{OPTIONS[name].option}{quote}"


def main(arguments: list[str]) -> int:
    """Write the files, or compare them; returns 0 where all are up to date."""
    parser = argparse.ArgumentParser(description="Write what the table of the options makes.")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args(arguments).check
    stale = [
        (path, text)
        for path, text in written().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for path, text in stale:
        print(f"{path.relative_to(ROOT)}: {'is not up to date' if check else 'written'}")
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
