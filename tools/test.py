"""Run the linters, the type checker, the build of the docs and the tests on the example models.

    python3 tools/test.py [--exporters] [--targets] [arguments of pytest]

Sets up ``.venv`` and gets the models that come out of packages.  With ``--exporters`` it also
installs torch and the other exporters and makes the models that need them; the tests of models
that are not in ``models/cache/`` skip themselves.

With ``--targets`` it also sets up the places where models are run: plugin providers, sshd, an
emulated ARM64 processor, onnxruntime-web and Chromium (see ``install_targets.py``).  What cannot be
had is said, and its tests skip and say so too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import install_targets
from setup_env import ROOT, SetupError, ensure_environment, fail, run

__all__ = ["main"]

# The version that the models are made with.  Where pip can find a CPU wheel (2.13.0+cpu), this
# pin takes it, and the extra's torch is then there already.
TORCH = "torch==2.13.0"


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
        "--targets", action="store_true", help="set up the targets that can run here"
    )
    options, for_pytest = parser.parse_known_args(arguments)
    exporters = options.exporters
    try:
        python = ensure_environment(["dev", "docs", "dask"])
        if exporters:
            try:
                python = ensure_environment(
                    ["dev", "docs", "dask", "exporters", "olive"], first=[TORCH]
                )
            except SetupError as error:
                print(f"going on without the exporters: {error}", flush=True)
                exporters = False
        if options.targets:
            install_targets.install(python)
    except SetupError as error:
        return fail(error)

    steps: dict[str, list[str | Path]] = {
        "models": [ROOT / "models" / "get.py", "--all" if exporters else "--packages"],
        "ruff check": ["-m", "ruff", "check", "."],
        "ruff format": ["-m", "ruff", "format", "--check", "."],
        "mypy": ["-m", "mypy"],
        "docs": ["-m", "mkdocs", "build", "--strict", "--quiet"],
        # Two at a time: most of a test is one thread's work, and the targets wait a lot.
        "pytest": ["-m", "pytest", "-n", "2", *for_pytest],
    }
    failed = [name for name, step in steps.items() if run([python, *step]) != 0]
    if failed:
        return fail(RuntimeError(f"failed: {', '.join(failed)}"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
