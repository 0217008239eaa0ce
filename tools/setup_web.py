"""Set up the targets ``web``, ``web-chromium`` and ``web-webgpu`` in ``.web/`` of the checkout.

    python3 tools/setup_web.py

As ``onnx-lowrank providers --install web`` does in the user's cache; needs Node 18 or newer and npm
(``apt-get install nodejs npm``), and for the last two Chromium.
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
from onnx_lowrank.targets.web_setup import set_up

__all__ = ["main"]


def main(arguments: list[str]) -> int:
    """Install the package unless it is there; returns 0 if it is then there."""
    argparse.ArgumentParser(description="Install onnxruntime-web.").parse_args(arguments)
    folder = Path(os.environ.get("ONNX_LOWRANK_WEB") or ROOT / ".web").absolute()
    try:
        set_up(folder, partial(print, flush=True))
    except InputError as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
