"""Install what the targets need, as far as it can be had here; each part that cannot says why.

    python3 tools/install_targets.py

Debian packages are installed where this is Debian and the user may (root); the rest goes into
``.venv``, ``.arm64`` and ``.web`` in the checkout.
"""

from __future__ import annotations

import os
import shutil
import sys
import tomllib
from pathlib import Path

from setup_env import ROOT, SetupError, ensure_environment, fail, run

__all__ = ["install"]

# What a part needs -> the programs that have to be there, and the packages that bring them.
PACKAGES = {
    "ssh": (("ssh", "sshd"), ("openssh-client", "openssh-server")),
    "qemu-arm64": (("qemu-aarch64", "gcc"), ("qemu-user", "gcc", "libc6-dev")),
    "web": (("node", "npm"), ("nodejs", "npm")),
    "web-chromium, web-webgpu, webgpu": (("chromium",), ("chromium",)),
}
EXTRAS = ("openvino", "qnn", "webgpu")
PROGRAMS = {"qemu-arm64": "setup_arm64.py", "web": "setup_web.py"}


def install(python: Path) -> None:
    """Install everything that can be had, and say what cannot.

    Args:
        python: the Python of ``.venv``.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra in EXTRAS:
        if extra in project["optional-dependencies"]:
            try:
                ensure_environment(["dev", extra])
            except SetupError as error:
                _go_on(extra, str(error))
    updated = False
    for part, (programs, packages) in PACKAGES.items():
        missing = [program for program in programs if not _there(program)]
        if not missing:
            continue
        if shutil.which("apt-get") is None or os.geteuid() != 0:
            _go_on(part, f"no {', '.join(missing)}; as root: apt-get install {' '.join(packages)}")
            continue
        if not updated:
            updated = True
            run(["apt-get", "-qq", "update"])
        options = ["-y", "-qq", "-o", "DPkg::Lock::Timeout=300", "--no-install-recommends"]
        if run(
            ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", *options, *packages]
        ):
            _go_on(part, "apt-get failed (its reason is above)")
    for part, program in PROGRAMS.items():
        if run([python, ROOT / "tools" / program]) != 0:
            _go_on(part, f"{program} failed (its reason is above)")


def _there(program: str) -> bool:
    path = f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin{os.pathsep}/sbin"
    return shutil.which(program, path=path) is not None


def _go_on(part: str, why: str) -> None:
    print(f"going on without {part}: {why}", flush=True)


if __name__ == "__main__":
    try:
        install(ensure_environment(["dev"]))
    except SetupError as setup_error:
        sys.exit(fail(setup_error))
