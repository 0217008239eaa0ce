"""Set up the target ``qemu-arm64``: an ARM64 Python with onnxruntime, which qemu-user runs.

Needs Debian (or what is made of it) with its package sources, pip, and the packages qemu-user, gcc
and libc6-dev; nothing of the system is changed.  What is made is Debian's Python for arm64 with its
libraries, the wheels of onnxruntime and numpy for aarch64, for every CPU the files in which
onnxruntime reads what it can do, and a plugin of qemu that counts instructions
(``count_instructions.c``).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from onnx_lowrank.errors import InputError
from onnx_lowrank.targets.setup import Say, hint, packages, renewed, run, stamped

__all__ = ["CPUS", "NEEDED", "counter_source", "set_up"]

NEEDED = ("qemu-user", "gcc", "libc6-dev")
"""Packages of the system."""

_ARMV8 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
_ARMV82 = f"{_ARMV8} atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"
# qemu's name -> part number and features; they have to be those of the CPU that qemu plays, or
# onnxruntime takes kernels with instructions that it does not have.
CPUS: dict[str, tuple[str, str]] = {
    "cortex-a53": ("0xd03", _ARMV8),
    "cortex-a72": ("0xd08", _ARMV8),
    "cortex-a76": ("0xd0b", _ARMV82),
    "neoverse-n1": ("0xd0c", _ARMV82),
}
_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")
_NEWEST_PLUGIN_VERSION = 9
# What is in the folder.
_OWN = ("cpu", "libcount.so", "setup.json", "site", "sysroot", "wheels")


def set_up(target: Path, say: Say, version: str | None = None, *, force: bool = False) -> None:
    """Make the folder unless it is there.

    Args:
        target: the folder.
        say: takes what is being done.
        version: of onnxruntime; None for that of this Python, or the newest.
        force: whether it is made anew.

    Raises:
        InputError: a program is missing or failed.
    """
    version = version or _installed()
    sources = b"".join(path.read_bytes() for path in (Path(__file__), counter_source()))
    wanted = {"onnxruntime": version, "sources": hashlib.sha256(sources).hexdigest()}
    stamp = target / "setup.json"
    if not force and stamped(stamp, "wanted") == wanted:
        say(f"{target} is there")
        return
    missing = [word for word in ("qemu-aarch64", "gcc", "apt-get", "dpkg-deb") if not _has(word)]
    if missing:
        raise InputError(f"no {', '.join(missing)} here{hint(packages(*NEEDED))}")

    def make(new: Path) -> None:
        python = _sysroot(new, say)
        found = _wheels(new, python, version, say)
        for cpu, (part, features) in CPUS.items():
            _cpu(new / "cpu" / cpu, part, features)
        qemu = _build_plugin(new, python, say)
        content = {"wanted": wanted, "python": python, "onnxruntime": found, "qemu": qemu}
        (new / "setup.json").write_text(json.dumps(content), encoding="utf-8")
        say(f"{target}: onnxruntime {found} for aarch64, {python}, {qemu}")

    renewed(target, make, _OWN)


def _has(program: str) -> bool:
    return shutil.which(program) is not None


def counter_source() -> Path:
    """The plugin of qemu that counts instructions, as source."""
    return Path(__file__).with_name("count_instructions.c")


def _installed() -> str | None:
    try:
        return importlib.metadata.version("onnxruntime")
    except importlib.metadata.PackageNotFoundError:
        return None


def _sysroot(new: Path, say: Say) -> str:
    """Unpack Debian's Python for arm64; its name, such as "python3.11"."""
    say("getting an arm64 Python")
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
    run(["apt-get", *own, "update"], "apt-get update for arm64")
    depends = run(["apt-cache", *own, "depends", "python3-minimal"], "apt-cache")
    python = re.search(r"(python3\.\d+)-minimal", depends)
    if python is None:
        raise InputError("the package sources have no Python for arm64")
    name = python[1]
    wanted = [f"{name}-minimal", f"lib{name}-stdlib", "libstdc++6"]
    install = ["install", "-y", "--no-install-recommends", "--download-only"]
    run(["apt-get", *own, *install, *wanted], "apt-get download for arm64")
    for package in sorted((apt / "cache" / "archives").glob("*.deb")):
        run(["dpkg-deb", "-x", package, new / "sysroot"], f"unpacking {package.name}")
    if not (new / "sysroot" / "lib").exists():  # where everything is below /usr
        (new / "sysroot" / "lib").symlink_to("usr/lib")
    shutil.rmtree(apt)
    return name


def _wheels(new: Path, python: str, version: str | None, say: Say) -> str:
    """Download and unpack the wheels; the version of onnxruntime."""
    say("getting the aarch64 wheels")
    wheels = new / "wheels"
    platforms = [word for name in _PLATFORMS for word in ("--platform", name)]
    run(
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


def _build_plugin(new: Path, python: str, say: Say) -> str:
    """Compile the plugin for the interface that this qemu has, and try everything out."""
    say("compiling the plugin and trying it")
    library, cpu = new / "libcount.so", new / "cpu" / "cortex-a76"
    guest: list[str | Path] = [new / "sysroot" / "usr" / "bin" / python, "-c", "import onnxruntime"]
    environment = ["-E", f"PYTHONHOME={new}/sysroot/usr", "-E", f"PYTHONPATH={new}/site"]
    emulator: list[str | Path] = ["qemu-aarch64", "-cpu", "cortex-a76", "-L", cpu, *environment]
    for version in range(1, _NEWEST_PLUGIN_VERSION + 1):
        run(
            [
                *("gcc", "-O2", "-shared", "-fPIC", f"-DPLUGIN_VERSION={version}"),
                *("-o", library, counter_source()),
            ],
            "compiling the plugin",
        )
        tried = [*emulator, "-plugin", f"{library},out={new}/counts", guest[0], "-c", "pass"]
        done = subprocess.run(list(map(str, tried)), capture_output=True, check=False)
        if done.returncode == 0:
            break
    else:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise InputError(f"qemu-aarch64 does not take the plugin: {said[-1] if said else done}")
    (new / "counts").unlink(missing_ok=True)
    run([*emulator, *guest], "importing onnxruntime in the emulator")
    return " ".join(run(["qemu-aarch64", "--version"], "qemu-aarch64").split()[0::2][:2])
