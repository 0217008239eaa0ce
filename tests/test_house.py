"""The plan of the packages: who may import whom, held against the imports of the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.helpers.places import ROOT

PACKAGE = ROOT / "onnx_lowrank"

# From the top floor down.  `numerics` knows arrays only, so everybody may use it.
FLOORS: dict[str, set[str]] = {
    "cli": {
        "reports", "compression", "ranks", "evaluation", "fitting", "targets", "autodiff", "maps",
        "data", "runtime", "graph", "numerics",
    },
    "reports": {
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
# One home each, also the package `schema`; all may use them, and they use only each other.
GROUND = {"errors", "files", "phrases", "progress", "schema"}


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


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) in GROUND])
def test_the_ground_uses_no_package_above(name: str) -> None:
    assert not [target for target, _ in imports(name) if room(target) not in GROUND]


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
    assert packages == {*FLOORS, "schema"}
    assert packages | plain == {*FLOORS, *GROUND}


@pytest.mark.parametrize("name", [*FLOORS, *GROUND])
def test_every_room_says_what_it_is(name: str) -> None:
    text = ast.get_docstring(MODULES[f"onnx_lowrank.{name}"])
    assert text
    assert text.partition("\n\n")[0].rstrip().endswith(".")


def test_tests_mirror_the_packages() -> None:
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/__init__.py")}
    assert folders - {"helpers", "models", "tools"} <= {*FLOORS, *GROUND}
    loose = {path.name for path in (ROOT / "tests").glob("test_*.py")}
    assert loose <= {"test_house.py"}, "a test lies in the folder of the package that it tests"


def test_what_tests_share_is_among_the_helpers() -> None:
    """No test module is imported: whoever changes one may think that nobody else reads it."""
    wrong = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                targets = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            else:
                continue
            if any(re.match(r"tests\.(\w+\.)*test_", target) for target in targets):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong, "\n".join(wrong)


def is_private(name: str) -> bool:
    """Whether a name is one module's own; ``__dunder__`` names are Python's."""
    return name.startswith("_") and not name.endswith("__") and name.strip("_") != ""


def written(tree: ast.Module) -> set[str]:
    """Names that a module defines itself: functions, classes, variables and attributes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return found


def private_reads(tree: ast.Module) -> Iterator[str]:
    """Private names of other modules that a module imports, reads, or names to ``setattr``."""
    own = written(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            words = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            names = [name for name in words if is_private(name)]
        elif isinstance(node, ast.Attribute):
            plain = isinstance(node.value, ast.Name)
            ours = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "os")
            names = [node.attr] if is_private(node.attr) and not (plain and ours) else []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            texts = [a.value for a in node.args if isinstance(a, ast.Constant)]
            patched = node.func.attr in ("setattr", "delattr", "patch")
            words = [str(text).rpartition(".")[2] for text in texts[:2]] if patched else []
            names = [name for name in words if is_private(name)]
        else:
            continue
        yield from (f"{node.lineno}: {name}" for name in names if name not in own)


@pytest.mark.parametrize("folder", ["onnx_lowrank", "tests", "tools", "models"])
def test_a_private_name_is_used_in_its_module_only(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{read}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for read in private_reads(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "text",
    [
        "from a.b import _c",
        "from a._b import c",
        "import a\na._c()",
        "monkeypatch.setattr(a, '_c', 1)",
        "monkeypatch.setattr('a.b._c', 1)",
    ],
)
def test_a_private_name_of_another_module_is_seen(text: str) -> None:
    assert list(private_reads(ast.parse(text)))


def test_one_class_has_one_name() -> None:
    """A name of a public class says one thing in the whole package."""
    homes: dict[str, list[str]] = {}
    for name, tree in MODULES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not is_private(node.name):
                homes.setdefault(node.name, []).append(name)
    assert not {name: places for name, places in homes.items() if len(places) > 1}


def documented(tree: ast.Module) -> Iterator[str]:
    """The docstrings of a module, also those of attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield str(node.value.value)


@pytest.mark.parametrize("own", [own for own in FLOORS if own not in ("cli", "compression")])
def test_options_are_the_business_of_the_command(own: str) -> None:
    """Docstrings below it use the words of the field; a flag of another program is no option."""
    options = r"``--|--(data|ep|fisher|for|heal|metric|ops|target|input-shape|dim)\b"
    texts = (text for name in MODULES if room(name) == own for text in documented(MODULES[name]))
    wrong = [text for text in texts if re.search(options, text)]
    assert not wrong, "\n".join(wrong)
