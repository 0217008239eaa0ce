"""The documentation is true: its blocks run, its links lead somewhere, its options exist.

A fenced block of ``python``, ``sh`` or ``console`` runs unless the line above it is
``<!-- not run: why -->``.  One below ``<!-- needs: module, … -->`` stands alone, and is skipped
where a module is not there.  The other blocks of a page run in their order in one folder, which
holds ``model.onnx`` (input ``x`` [batch, 64], output ``logits``), ``data.npz`` and ``small.onnx``,
made from it.  A command that writes ``small.onnx`` finds the place free, as a reader does.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import onnx
import pytest

from onnx_lowrank import compress
from onnx_lowrank.cli.program import cli
from tests.helpers.commands import call
from tests.helpers.models import known_rank, parse
from tests.helpers.places import ROOT

PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "models" / "README.md"],
)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<why>[^\n]+) -->\n|<!-- needs: (?P<needs>[^\n]+) -->\n)?"
    r"```(?P<kind>[a-z]*)\n(?P<body>.*?)^```$",
    re.M | re.S,
)
LINK = re.compile(r"\[[^\]]*\]\((?P<to>[^)\s]+)\)")
OPTION = re.compile(r"--[a-z][a-z0-9-]*")
RUN = ("python", "sh", "console")
PROGRAM = "onnx-lowrank"


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; ``why`` says why it is not run, ``needs`` are modules."""

    kind: str
    body: str
    why: str | None
    needs: tuple[str, ...] = ()

    def commands(self) -> list[list[str]]:
        """The words of every command of a ``sh`` or ``console`` block."""
        lines = self.body.replace("\\\n", " ").splitlines()
        if self.kind == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(text: str) -> list[Block]:
    return [
        Block(m["kind"], m["body"], m["why"], tuple((m["needs"] or "").replace(",", " ").split()))
        for m in BLOCK.finditer(text)
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a reader who has exported a model and saved samples."""
    folder = tmp_path_factory.mktemp("docs")
    rng = np.random.default_rng(0)
    weights = {
        "W1": known_rank(64, 128, 12, rng),
        "W2": known_rank(128, 128, 12, rng),
        "W3": known_rank(128, 10, 8, rng),
    }
    model = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        classifier (float[batch, 64] x) => (float[batch, 10] logits) {
            a = MatMul(x, W1)
            b = Relu(a)
            c = MatMul(b, W2)
            d = Relu(c)
            logits = MatMul(d, W3)
        }""",
        weights,
    )
    onnx.save(model, folder / "model.onnx")
    x = rng.standard_normal((120, 64)).astype(np.float32)
    np.savez(folder / "data.npz", x=x, labels=np.arange(120) % 10)
    result = compress(folder / "model.onnx", simplify=False, check=False, bench=False)
    result.save(folder / "small.onnx")
    return folder


@pytest.fixture
def place(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of those files, as the working folder."""
    # onnxsim takes seconds to start, and this model has nothing to simplify.
    monkeypatch.setattr("onnx_lowrank.graph.simplify.SIZE_LIMIT", 0)
    folder = tmp_path / "work"
    shutil.copytree(files, folder)
    monkeypatch.chdir(folder)
    return folder


def run(words: list[str], folder: Path) -> int:
    """The exit code of a command of a page."""
    if words[0] == "python":
        words = [sys.executable, *words[1:]]
    if words[0] != PROGRAM:
        return subprocess.run(words, cwd=folder, check=False).returncode
    arguments = words[1:]
    if arguments[0] not in cli.commands and "--force" not in arguments:
        (folder / arguments[1]).unlink(missing_ok=True)
    return call(*arguments)


def runnable() -> list[str]:
    """Pages with something to run."""
    return [
        name
        for name, page in zip(NAMES, PAGES, strict=True)
        if any(b.kind in RUN and b.why is None for b in blocks(page.read_text(encoding="utf-8")))
    ]


@pytest.mark.parametrize("name", runnable())
def test_the_blocks_of_a_page_run(name: str, place: Path) -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks((ROOT / name).read_text(encoding="utf-8")):
        if block.why is not None or block.kind not in RUN or block.needs:
            continue
        if block.kind == "python":
            exec(compile(block.body, name, "exec"), namespace)
            continue
        for words in block.commands():
            assert run(words, place) == 0, shlex.join(words)


ALONE = [
    pytest.param(block, id=f"{name}-{number}")
    for name, page in zip(NAMES, PAGES, strict=True)
    for number, block in enumerate(blocks(page.read_text(encoding="utf-8")))
    if block.needs
]


@pytest.mark.parametrize("block", ALONE)
@pytest.mark.usefixtures("place")
def test_a_block_that_needs_more_runs(block: Block) -> None:
    missing = [module for module in block.needs if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    exec(compile(block.body, "block", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    prose = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for to in (match["to"] for match in LINK.finditer(prose)):
        if re.match(r"[a-z]+://", to):
            continue
        file, _, part = to.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{name}: {to}"
        assert ROOT in target.parents
        if part:
            assert part in anchors(target.read_text(encoding="utf-8")), f"{name}: {to}"


def anchors(text: str) -> set[str]:
    """Names of the headings, as the site and the usual hosts make them."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", text), re.M)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}


def options_of(command: click.Command) -> set[str]:
    found = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
    return found | {"--help", "--version"}


def options_of_programs() -> Iterator[str]:
    """Options of the programs in tools/ and models/."""
    for file in (*(ROOT / "tools").glob("*.py"), *(ROOT / "models").glob("*.py")):
        yield from re.findall(r"\"(--[a-z][a-z-]*)\"", file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_options_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for block in blocks(text):
        for words in block.commands() if block.kind in ("sh", "console") else ():
            if words[0] != PROGRAM:
                continue
            command = cli.commands[words[1] if words[1] in cli.commands else "compress"]
            wrong = {w.partition("=")[0] for w in words if OPTION.match(w)} - options_of(command)
            assert not wrong, shlex.join(words)
    known = {o for command in cli.commands.values() for o in options_of(command)}
    known |= set(options_of_programs())
    # What is history keeps the names that it had.
    spans = [] if name == "CHANGELOG.md" else re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))
    used = {o for s in spans if s.startswith(("--", PROGRAM)) for o in OPTION.findall(s)}
    assert used <= known, used - known


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_page_is_reached_from_the_overview() -> None:
    overview = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    reached = {match["to"] for match in LINK.finditer(overview)}
    pages = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert pages - {"index.md"} <= reached
