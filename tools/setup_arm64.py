"""Set up the target ``qemu-arm64``: an ARM64 Python with onnxruntime, which qemu-user runs.

    python3 tools/setup_arm64.py [--onnxruntime VERSION] [--force]

Needs Debian (or what is made of it) with its package sources, pip, and

    apt-get install qemu-user gcc libc6-dev

and nothing of the system is changed: everything goes into ``.arm64/`` in the checkout or where
``ONNX_LOWRANK_ARM64`` says.  That is Debian's Python for arm64 with its libraries, the wheels of
onnxruntime and numpy for aarch64, for every CPU the files in which onnxruntime reads what it can
do, and a plugin of qemu that counts instructions (``count_instructions.c``).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from setup_env import ROOT, SetupError, fail

__all__ = ["main"]

_ARMV8 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
_ARMV82 = f"{_ARMV8} atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"
# qemu's name -> part number and features; they have to be those of the CPU that qemu plays, or
# onnxruntime takes kernels with instructions that it does not have.
CPUS = {
    "cortex-a53": ("0xd03", _ARMV8),
    "cortex-a72": ("0xd08", _ARMV8),
    "cortex-a76": ("0xd0b", _ARMV82),
    "neoverse-n1": ("0xd0c", _ARMV82),
}
_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")
_NEWEST_PLUGIN_VERSION = 9


def main(arguments: list[str]) -> int:
    """Set everything up unless it is there; returns 0 if it is then there."""
    parser = argparse.ArgumentParser(description="Set up the target qemu-arm64.")
    parser.add_argument(
        "--onnxruntime", metavar="VERSION", help="default: that of this Python, or the newest"
    )
    parser.add_argument("--force", action="store_true", help="make it anew")
    options = parser.parse_args(arguments)
    try:
        set_up(folder(), options.onnxruntime or _installed(), force=options.force)
    except (SetupError, OSError) as error:
        return fail(error)
    return 0


def folder() -> Path:
    """Where it goes."""
    return Path(os.environ.get("ONNX_LOWRANK_ARM64") or ROOT / ".arm64").absolute()


def set_up(target: Path, version: str | None, *, force: bool) -> None:
    """Make the folder: beside it first, so that what is there is whole.

    Raises:
        SetupError: a program is missing or failed.
    """
    sources = b"".join(path.read_bytes() for path in (Path(__file__), _plugin()))
    wanted = {"onnxruntime": version, "sources": hashlib.sha256(sources).hexdigest()}
    stamp = target / "setup.json"
    if not force and stamp.is_file() and json.loads(stamp.read_text("utf-8"))["wanted"] == wanted:
        print(f"{target} is there", flush=True)
        return
    missing = [word for word in ("qemu-aarch64", "gcc", "apt-get", "dpkg-deb") if not _has(word)]
    if missing:
        raise SetupError(f"no {', '.join(missing)} here; apt-get install qemu-user gcc libc6-dev")
    new = target.with_name(f"{target.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        python = _sysroot(new)
        found = _wheels(new, python, version)
        for cpu, (part, features) in CPUS.items():
            _cpu(new / "cpu" / cpu, part, features)
        qemu = _build_plugin(new, python)
        content = {"wanted": wanted, "python": python, "onnxruntime": found, "qemu": qemu}
        (new / "setup.json").write_text(json.dumps(content), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        new.rename(target)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    print(f"{target}: onnxruntime {found} for aarch64, {python}, {qemu}", flush=True)


def _has(program: str) -> bool:
    return shutil.which(program) is not None


def _plugin() -> Path:
    return Path(__file__).with_name("count_instructions.c")


def _installed() -> str | None:
    try:
        return importlib.metadata.version("onnxruntime")
    except importlib.metadata.PackageNotFoundError:
        return None


def _run(command: Sequence[str | Path], what: str) -> str:
    """Run a command; its standard output.

    Raises:
        SetupError: it failed, with the last line of what it said.
    """
    try:
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, check=False, cwd=ROOT
        )
    except OSError as error:
        raise SetupError(f"{what}: {error}") from error
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise SetupError(f"{what}: {lines[-1] if lines else f'status {done.returncode}'}")
    return done.stdout


def _sysroot(new: Path) -> str:
    """Unpack Debian's Python for arm64; its name, such as "python3.11"."""
    print("getting an arm64 Python", flush=True)
    apt = new / "apt"
    for part in ("state/lists/partial", "cache/archives/partial"):
        (apt / part).mkdir(parents=True)
    (apt / "state" / "status").touch()
    # Lists, cache and what counts as installed are apt's own for this: the system stays as it is.
    own = [
        *("-o", "APT::Architecture=arm64", "-o", "APT::Architectures::=arm64"),
        *("-o", f"Dir::State={apt}/state", "-o", f"Dir::State::status={apt}/state/status"),
        *("-o", f"Dir::Cache={apt}/cache", "-o", "APT::Sandbox::User="),
    ]
    _run(["apt-get", *own, "update"], "apt-get update for arm64")
    depends = _run(["apt-cache", *own, "depends", "python3-minimal"], "apt-cache")
    python = re.search(r"(python3\.\d+)-minimal", depends)
    if python is None:
        raise SetupError("the package sources have no Python for arm64")
    name = python[1]
    packages = [f"{name}-minimal", f"lib{name}-stdlib", "libstdc++6"]
    install = ["install", "-y", "--no-install-recommends", "--download-only"]
    _run(["apt-get", *own, *install, *packages], "apt-get download for arm64")
    for package in sorted((apt / "cache" / "archives").glob("*.deb")):
        _run(["dpkg-deb", "-x", package, new / "sysroot"], f"unpacking {package.name}")
    if not (new / "sysroot" / "lib").exists():  # where everything is below /usr
        (new / "sysroot" / "lib").symlink_to("usr/lib")
    shutil.rmtree(apt)
    return name


def _wheels(new: Path, python: str, version: str | None) -> str:
    """Download and unpack the wheels; the version of onnxruntime."""
    print("getting the aarch64 wheels", flush=True)
    wheels = new / "wheels"
    platforms = [word for name in _PLATFORMS for word in ("--platform", name)]
    _run(
        [
            *(sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"),
            *("--no-deps", "--only-binary=:all:", *platforms),
            *("--python-version", python.removeprefix("python"), "-d", wheels),
            f"onnxruntime=={version}" if version else "onnxruntime",
            *("numpy", "flatbuffers", "packaging", "protobuf"),
        ],
        "pip download",
    )
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(new / "site")
    found = next(wheels.glob("onnxruntime-*.whl")).name.split("-")[1]
    shutil.rmtree(wheels)
    if python == f"python{sys.version_info.major}.{sys.version_info.minor}":
        # The same bytecode: importing takes half the time in the emulator.
        standard = new / "sysroot" / "usr" / "lib" / python
        subprocess.run(
            [sys.executable, "-m", "compileall", "-q", new / "site", standard],
            stdout=subprocess.DEVNULL,
            check=False,
        )
    return found


def _cpu(root: Path, part: str, features: str) -> None:
    """A root of the file system in which the kernel tells of this CPU."""
    (root / "proc").mkdir(parents=True)
    for name in ("usr", "lib", "etc"):
        (root / name).symlink_to(f"../../sysroot/{name}")
    (root / "proc" / "cpuinfo").write_text(
        f"processor\t: 0\nBogoMIPS\t: 100.00\nFeatures\t: {features}\nCPU implementer\t: 0x41\n"
        f"CPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: {part}\nCPU revision\t: 0\n\n"
    )
    cpus = root / "sys" / "devices" / "system" / "cpu"
    for file, text in {
        **dict.fromkeys(("possible", "present", "online", "kernel_max"), "0"),
        **{f"cpu0/topology/{name}_id": "0" for name in ("physical_package", "core", "cluster")},
        "cpu0/topology/core_siblings_list": "0",
        "cpu0/topology/thread_siblings_list": "0",
        "cpu0/cpufreq/cpuinfo_max_freq": "2000000",
    }.items():
        path = cpus / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


def _build_plugin(new: Path, python: str) -> str:
    """Compile the plugin for the interface that this qemu has, and try everything out."""
    print("compiling the plugin and trying it", flush=True)
    library, cpu = new / "libcount.so", new / "cpu" / "cortex-a76"
    guest: list[str | Path] = [new / "sysroot" / "usr" / "bin" / python, "-c", "import onnxruntime"]
    environment = ["-E", f"PYTHONHOME={new}/sysroot/usr", "-E", f"PYTHONPATH={new}/site"]
    emulator: list[str | Path] = ["qemu-aarch64", "-cpu", "cortex-a76", "-L", cpu, *environment]
    for version in range(1, _NEWEST_PLUGIN_VERSION + 1):
        _run(
            [
                *("gcc", "-O2", "-shared", "-fPIC", f"-DPLUGIN_VERSION={version}"),
                *("-o", library, _plugin()),
            ],
            "compiling the plugin",
        )
        tried = [*emulator, "-plugin", f"{library},out={new}/counts", guest[0], "-c", "pass"]
        done = subprocess.run(list(map(str, tried)), capture_output=True, check=False)
        if done.returncode == 0:
            break
    else:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise SetupError(f"qemu-aarch64 does not take the plugin: {said[-1] if said else done}")
    (new / "counts").unlink(missing_ok=True)
    _run([*emulator, *guest], "importing onnxruntime in the emulator")
    return " ".join(_run(["qemu-aarch64", "--version"], "qemu-aarch64").split()[0::2][:2])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
