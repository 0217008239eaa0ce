"""Set up the target ``qemu-arm64`` in ``.arm64/`` of the checkout.

    python3 tools/setup_arm64.py [--onnxruntime VERSION] [--force]

As ``onnx-lowrank providers --install qemu-arm64`` does in the user's cache; needs Debian (or what
is made of it) with its package sources, pip, and ``apt-get install qemu-user gcc libc6-dev``.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from setup_env import ROOT, fail

sys.path.insert(0, str(ROOT))

from onnx_lowrank.errors import InputError
from onnx_lowrank.targets.arm64_setup import set_up

__all__ = ["main"]


def main(arguments: list[str]) -> int:
    """Set everything up unless it is there; returns 0 if it is then there."""
    parser = argparse.ArgumentParser(description="Set up the target qemu-arm64.")
    parser.add_argument(
        "--onnxruntime", metavar="VERSION", help="default: that of this Python, or the newest"
    )
    parser.add_argument("--force", action="store_true", help="make it anew")
    options = parser.parse_args(arguments)
    folder = Path(os.environ.get("ONNX_LOWRANK_ARM64") or ROOT / ".arm64").absolute()
    try:
        set_up(folder, partial(print, flush=True), options.onnxruntime, force=options.force)
    except InputError as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
