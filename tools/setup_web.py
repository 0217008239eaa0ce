"""Set up the targets ``web``, ``web-chromium`` and ``web-webgpu``: the npm package onnxruntime-web.

    python3 tools/setup_web.py

Needs Node 18 or newer and npm (``apt-get install nodejs npm``); the package goes into ``.web/`` in
the checkout, or where ``ONNX_LOWRANK_WEB`` says.  The last two also need Chromium
(``apt-get install chromium``).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setup_env import ROOT, SetupError, fail

__all__ = ["main"]

VERSION = "1.30.0"


def main(arguments: list[str]) -> int:
    """Install the package unless it is there; returns 0 if it is then there."""
    argparse.ArgumentParser(description="Install onnxruntime-web.").parse_args(arguments)
    try:
        set_up(Path(os.environ.get("ONNX_LOWRANK_WEB") or ROOT / ".web").absolute())
    except (SetupError, OSError) as error:
        return fail(error)
    return 0


def set_up(target: Path) -> None:
    """Make the folder: beside it first, so that what is there is whole.

    Raises:
        SetupError: there is no npm, or it failed.
    """
    package = target / "node_modules" / "onnxruntime-web" / "package.json"
    if package.is_file() and json.loads(package.read_text("utf-8"))["version"] == VERSION:
        print(f"{target} is there", flush=True)
        return
    npm = shutil.which("npm")
    if npm is None:
        raise SetupError("no npm here; apt-get install nodejs npm")
    new = target.with_name(f"{target.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        (new / "package.json").write_text('{"private": true}\n')
        command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts"]
        done = subprocess.run(
            [*command, f"onnxruntime-web@{VERSION}"],
            cwd=new,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            lines = [line for line in done.stderr.strip().splitlines() if "npm error" in line]
            raise SetupError(f"npm: {lines[0] if lines else f'status {done.returncode}'}")
        shutil.rmtree(target, ignore_errors=True)
        new.rename(target)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    print(f"{target}: onnxruntime-web {VERSION}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
