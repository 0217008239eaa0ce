"""Install what a target needs: ``onnx-lowrank providers --install NAME``."""

from __future__ import annotations

import sys

from onnx_lowrank.errors import InputError, UsageError, named
from onnx_lowrank.runtime.plugins import PLUGINS, no_use, requirements
from onnx_lowrank.targets import arm64_setup, web_setup
from onnx_lowrank.targets.setup import Say, folder_of, run

__all__ = ["INSTALLABLE", "install"]

INSTALLABLE = (*PLUGINS, "qemu-arm64", "web", "web-chromium", "web-webgpu")
"""Names of targets; the last three are one installation."""


def install(name: str, say: Say) -> None:
    """Install what a target needs: packages into this Python, other files into the user's cache.

    Args:
        name: one of `INSTALLABLE`.
        say: takes what is being done.

    Raises:
        InputError: it cannot be had, or would be of no use here.
        UsageError: there is nothing to install for this name.
    """
    if name not in INSTALLABLE:
        raise UsageError(
            f"{named('install', name)}: expected one of {', '.join(INSTALLABLE)}; other targets "
            f"need no package of their own, or one of the system"
        )
    try:
        if name in PLUGINS:
            _plugin(name, say)
        elif name == "qemu-arm64":
            arm64_setup.set_up(folder_of("arm64"), say)
        else:
            web_setup.set_up(folder_of("web"), say)
    except InputError as error:
        raise InputError(f"{named('install', name)}: {error}") from error


def _plugin(name: str, say: Say) -> None:
    why = no_use(PLUGINS[name])
    if why is not None:
        raise InputError(f"it would not help: {why}")
    wanted = requirements(name)
    say(f"pip install {' '.join(wanted)}")
    run([sys.executable, "-m", "pip", "install", "-q", *wanted], "pip")
    say(f"{name}: installed into {sys.prefix}")
