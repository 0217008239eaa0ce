"""Run the linters, the type checker and the tests on the example models.

    python3 tools/test.py [--exporters] [--targets] [arguments of pytest]

Sets up ``.venv`` and gets the models that come out of packages.  With ``--exporters`` it also
installs torch and the other exporters and makes the models that need them; the tests of models
that are not in ``models/cache/`` skip themselves.  With ``--targets`` it also installs the plugin
execution providers, each for itself; the tests of one that cannot be had skip and say so.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from setup_env import ROOT, SetupError, ensure_environment, fail, run

__all__ = ["main"]

# The version that the models are made with.  Where pip can find a CPU wheel (2.13.0+cpu), this
# pin takes it, and the extra's torch is then there already.
TORCH = "torch==2.13.0"
PLUGINS = ("openvino", "qnn", "webgpu")


def main(arguments: list[str]) -> int:
    """Run everything; returns 0 if all of it passed."""
    parser = argparse.ArgumentParser(
        description="Run the linters, the type checker and the tests.",
        epilog="other arguments go to pytest",
    )
    parser.add_argument(
        "--exporters", action="store_true", help="install the exporters and make their models"
    )
    parser.add_argument(
        "--targets", action="store_true", help="install the plugin execution providers"
    )
    options, for_pytest = parser.parse_known_args(arguments)
    exporters = options.exporters
    try:
        python = ensure_environment(["dev"])
        if exporters:
            try:
                python = ensure_environment(["dev", "exporters"], first=[TORCH])
            except SetupError as error:
                print(f"going on without the exporters: {error}", flush=True)
                exporters = False
        for extra in PLUGINS if options.targets else ():
            try:
                python = ensure_environment(["dev", extra])
            except SetupError as error:
                print(f"going on without {extra}: {error}", flush=True)
    except SetupError as error:
        return fail(error)

    steps: dict[str, list[str | Path]] = {
        "models": [ROOT / "models" / "get.py", "--all" if exporters else "--packages"],
        "ruff check": ["-m", "ruff", "check", "."],
        "ruff format": ["-m", "ruff", "format", "--check", "."],
        "mypy": ["-m", "mypy"],
        "pytest": ["-m", "pytest", *for_pytest],
    }
    failed = [name for name, step in steps.items() if run([python, *step]) != 0]
    if failed:
        return fail(RuntimeError(f"failed: {', '.join(failed)}"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
