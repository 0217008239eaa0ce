"""Print what one goal makes of every example model: never larger, never slower.

    python tools/models_table.py [--threads 1] [MODEL.onnx …] [-- options of onnx-lowrank]

Runs ``onnx-lowrank`` on the models of ``models/cache/`` (see ``models/get.py``), with their samples
where there are some (``MODEL.data.npz``), and with ``--energy 0.95`` unless other options follow
``--``.  Each result is then timed against its original once more by ``onnx-lowrank bench``, whose
runs had no say in what was made.  Returns 1 if a result is larger than its original, or slower by
more than the noise: the whole 95 % interval of the median ratio lies below 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["main"]

CACHE = Path(__file__).resolve().parent.parent / "models" / "cache"
GOAL = ("--energy", "0.95")
RUNS = 100


def main(arguments: Sequence[str]) -> int:
    """Print the table; returns 1 if a result is larger or slower than its original."""
    own, goal = list(arguments), list(GOAL)
    if "--" in own:
        own, goal = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", type=Path, help="default: all of models/cache/")
    parser.add_argument("--threads", type=int, default=1, help="intra-op threads")
    options = parser.parse_args(own)
    made_before = set(CACHE.glob("*-lowrank.onnx"))
    models = options.models or sorted(set(CACHE.glob("*.onnx")) - made_before)
    if not models:
        parser.error(f"no models in {CACHE}; python models/get.py --all makes them")
    print(f"onnx-lowrank IN OUT {' '.join(goal)} --threads {options.threads}")
    print(f"{'model':<18}{'bytes':>34}  {'pairs':>7}  speed-up (95 % interval)")
    wrong = []
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            wrong += row(model, goal, options.threads, Path(folder))
    print("\n".join(wrong) or "none is larger than its original, none slower")
    return 1 if wrong else 0


def row(model: Path, goal: Sequence[str], threads: int, folder: Path) -> list[str]:
    """Print one line; returns what is wrong with it."""
    result = folder / "out.onnx"
    samples = model.with_suffix(".data.npz")
    common = ["--threads", str(threads), *(["--data", str(samples)] if samples.exists() else [])]
    print(f"{model.stem:<18}", end="", flush=True)
    made = run([str(model), str(result), *goal, *common], folder / "made.json")
    if isinstance(made, str):
        print(f"  {made}")
        return [f"{model.name}: {made}"]
    timed = run(
        ["bench", str(model), str(result), "--iterations", str(RUNS), *common],
        folder / "timed.json",
    )
    if isinstance(timed, str):
        print(f"  {timed}")
        return [f"{model.name}: {timed}"]
    before, after = made["input"]["bytes"], made["output"]["bytes"]
    pairs = sum(layer["status"] == "factored" for layer in made["layers"])
    (ratio,) = timed["targets"][0]["ratios"]
    speedup = f"{ratio['median']:.2f}× ({ratio['low']:.2f}–{ratio['high']:.2f})"
    share = f"{before:,} → {after:,} ({after / before:.0%})"
    print(f"{share:>34}  {pairs:>3}/{len(made['layers']):<3}  {speedup}", flush=True)
    for note in made["notes"]:
        if "slower" in note or "dense" in note:
            print(f"  {note}")
    wrong = []
    if after > before:
        wrong.append(f"{model.name}: the result is larger")
    if ratio["high"] < 1.0:
        wrong.append(f"{model.name}: the result is slower")
    return wrong


def run(arguments: Sequence[str], report: Path) -> dict[str, Any] | str:
    """Run onnx-lowrank and read its report; what it said if it failed."""
    program = Path(sys.executable).with_name("onnx-lowrank")
    done = subprocess.run(
        [str(program), *arguments, "--report", str(report)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        return f"exit {done.returncode}: {done.stderr.strip()}"
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
