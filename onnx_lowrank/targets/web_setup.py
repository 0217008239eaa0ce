"""Set up the targets ``web``, ``web-chromium`` and ``web-webgpu``: the npm package onnxruntime-web.

Needs Node 18 or newer and npm.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from onnx_lowrank.errors import InputError
from onnx_lowrank.targets.setup import Say, hint, packages, renewed, run, stamped

__all__ = ["VERSION", "set_up"]

VERSION = "1.30.0"
"""Of onnxruntime-web."""
# What npm leaves in the folder.
_OWN = ("node_modules", "package-lock.json", "package.json")


def set_up(target: Path, say: Say) -> None:
    """Install the package unless it is there.

    Args:
        target: the folder.
        say: takes what is being done.

    Raises:
        InputError: there is no npm, or it failed.
    """
    package = target / "node_modules" / "onnxruntime-web" / "package.json"
    if stamped(package, "version") == VERSION:
        say(f"{target} is there")
        return
    npm = shutil.which("npm")
    if npm is None:
        raise InputError(f"no npm here{hint(packages('nodejs', 'npm'))}")

    def make(new: Path) -> None:
        (new / "package.json").write_text('{"private": true}\n', encoding="utf-8")
        command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts"]
        run([*command, f"onnxruntime-web@{VERSION}"], "npm", new)

    say("getting onnxruntime-web")
    renewed(target, make, _OWN)
    say(f"{target}: onnxruntime-web {VERSION}")
