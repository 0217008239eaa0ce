"""The plan of the packages: who may import whom, held against the imports of the code."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.helpers.places import ROOT

PACKAGE = ROOT / "onnx_lowrank"

# From the top floor down.  `numerics` knows arrays only, so everybody may use it.
FLOORS: dict[str, set[str]] = {
    "cli": {
        "compression", "ranks", "evaluation", "fitting", "targets", "autodiff", "maps", "data",
        "runtime", "graph", "numerics",
    },
    "compression": {
        "ranks", "evaluation", "fitting", "targets", "autodiff", "maps", "data", "runtime", "graph",
        "numerics",
    },
    "ranks": {"fitting", "evaluation", "maps", "data", "runtime", "graph", "numerics"},
    "evaluation": {"targets", "data", "runtime", "graph", "numerics"},
    "fitting": {"autodiff", "maps", "data", "runtime", "graph", "numerics"},
    "targets": {"runtime", "data", "graph", "numerics"},
    "autodiff": {"runtime", "graph", "numerics"},
    "maps": {"graph", "numerics"},
    "data": {"runtime", "graph", "numerics"},
    "runtime": {"graph", "numerics"},
    "graph": {"numerics"},
    "numerics": set(),
}  # fmt: skip
# One home each; every package may use them, and they use only each other.
GROUND = {"errors", "files", "progress", "report"}


def modules() -> dict[str, ast.Module]:
    """Dotted name -> syntax tree, of every module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        if parts[-1] == "__init__":
            del parts[-1]
        found[".".join(parts)] = ast.parse(path.read_text(encoding="utf-8"))
    return found


MODULES = modules()


def imports(name: str) -> Iterator[tuple[str, int]]:
    """The modules of this package that a module imports, also inside functions, and the line."""
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: imports are absolute here"
            base = node.module or ""
            inner = [f"{base}.{alias.name}" for alias in node.names]
            targets = [target if target in MODULES else base for target in inner]
        else:
            continue
        for target in dict.fromkeys(targets):
            if target.split(".")[0] == "onnx_lowrank":
                yield target, node.lineno


def room(name: str) -> str:
    """The package, or the module at the top, that a module belongs to."""
    return [*name.split("."), ""][1]


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) in FLOORS])
def test_arrows_between_packages_run_downward(name: str) -> None:
    own = room(name)
    allowed = {own} | FLOORS[own] | GROUND
    wrong = [
        f"{name}:{line} imports {target}"
        for target, line in imports(name)
        if room(target) not in allowed
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", sorted(GROUND))
def test_the_ground_uses_no_package(name: str) -> None:
    wrong = [t for t, _ in imports(f"onnx_lowrank.{name}") if room(t) not in GROUND]
    assert not wrong


def test_there_is_no_circle() -> None:
    """Neither among packages nor among modules, also behind imports inside functions."""
    below = {name: {target for target, _ in imports(name)} - {name} for name in MODULES}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name in done:
            return
        for target in sorted(below[name]):
            visit(target, (*way, name))
        done.add(name)

    for name in MODULES:
        visit(name, ())


def test_the_top_has_few_rooms() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    plain = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert packages == set(FLOORS)
    assert plain == GROUND


@pytest.mark.parametrize("name", [*FLOORS, *GROUND])
def test_every_room_says_what_it_is(name: str) -> None:
    text = ast.get_docstring(MODULES[f"onnx_lowrank.{name}"])
    assert text
    assert text.partition("\n\n")[0].rstrip().endswith(".")


def test_tests_mirror_the_packages() -> None:
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/__init__.py")}
    assert folders - {"helpers", "models"} <= set(FLOORS)
    loose = {path.name for path in (ROOT / "tests").glob("test_*.py")}
    assert loose <= {"test_house.py"}, "a test lies in the folder of the package that it tests"
