"""``qemu-arm64[?cpu=NAME]``: the aarch64 build of onnxruntime under qemu's user mode.

Outputs are those of the real ARM kernels, in real float16 where the CPU has it (cortex-a76,
neoverse-n1; not cortex-a53, cortex-a72).  Times would be those of the emulator and are not given;
the cost is the number of instructions that one inference executes on one thread, which is the same
to about 0.1 % whatever else the machine does.

``onnx-lowrank providers --install qemu-arm64`` sets it up in the user's cache or where
``ONNX_LOWRANK_ARM64`` says.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onnx_lowrank.errors import InputError, UsageError, named
from onnx_lowrank.numerics.arrays import Feed
from onnx_lowrank.progress import Advance
from onnx_lowrank.targets import runner
from onnx_lowrank.targets.address import parse
from onnx_lowrank.targets.arm64_setup import NEEDED
from onnx_lowrank.targets.base import (
    Job,
    Offer,
    Outcome,
    Target,
)
from onnx_lowrank.targets.packing import packed, read_result
from onnx_lowrank.targets.setup import folder_of, hint, packages

__all__ = ["KINDS", "QemuArm64", "create", "guest_command", "offers"]

_NAME = "qemu-arm64"
_INSTALL = f"onnx-lowrank providers --install {_NAME}"
_DEFAULT = "cortex-a76"
_COUNTED_RUNS = 3


KINDS = frozenset({_NAME})


def create(name: str) -> Target:
    """The target of ``qemu-arm64``.

    Raises:
        InputError: it is not set up, or has no such CPU.
        UsageError: the name is not as described above.
    """
    return QemuArm64(name)


def offers() -> list[Offer]:
    """The emulator, if it is set up."""
    try:
        setup = _setup()
    except InputError as error:
        return [Offer(_NAME, False, None, str(error), "emulated", _how())]
    version = f"onnxruntime {setup['onnxruntime']} for aarch64, {setup['qemu']}"
    return [Offer(_NAME, True, version, str(_folder()), "emulated", None)]


class QemuArm64(Target):
    """An emulated ARM64 processor."""

    emulated = True
    own = "CPUExecutionProvider"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        address = parse(name, ("cpu",))
        self._cpu = address.get("cpu") or _DEFAULT
        try:
            self._setup = _setup()
        except InputError as error:
            raise InputError(f"{named('targets', name)}: {error}{hint(_how())}") from error
        known = sorted(path.name for path in (_folder() / "cpu").iterdir())
        if self._cpu not in known:
            raise UsageError(
                f"{named('targets', name)}: expected a CPU of {', '.join(known)}; got {self._cpu!r}"
            )

    def run(
        self, models: Sequence[Path], feeds: Sequence[Feed], job: Job, advance: Advance
    ) -> tuple[Outcome, ...]:
        """Run a job there: outputs, nodes and instructions, no times.

        Raises:
            InputError: the emulator does not run at all, or the time is up.
        """
        job = dataclasses.replace(job, threads=1, iterations=0)
        with (
            tempfile.TemporaryDirectory(prefix="onnx-lowrank-") as counted,
            packed(
                models,
                feeds,
                job,
                in_place=True,
                python=guest_command(self._cpu, Path(counted) / "counts"),
                isolate=False,
                repeats=_COUNTED_RUNS,
            ) as parcel,
        ):
            runner.run(parcel.folder, lambda _: advance(1))
            outcomes = read_result(parcel.folder / "result", named("targets", self.name))
            instructions = _instructions(Path(counted) / "counts")
        return tuple(
            dataclasses.replace(
                outcome,
                load_ns=None,
                first_ns=None,
                peak_bytes=None,
                costs={} if number not in instructions else {"instructions": instructions[number]},
            )
            for number, outcome in enumerate(outcomes)
        )


def guest_command(cpu: str, counts: Path | None = None) -> list[str]:
    """Words that start the ARM64 Python.

    Args:
        cpu: its CPU.
        counts: file that gets the counts of instructions; None counts none.

    Raises:
        InputError: the emulator is not set up.
    """
    setup, folder = _setup(), _folder()
    plugin = []
    if counts is not None:  # qemu takes a comma for the end of a value, unless there are two
        library, out = (str(path).replace(",", ",,") for path in (folder / "libcount.so", counts))
        plugin = ["-plugin", f"{library},out={out}"]
    variables = {
        "PYTHONHOME": f"{folder}/sysroot/usr",
        "PYTHONPATH": f"{folder}/site",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
    }
    return [
        *("qemu-aarch64", "-cpu", cpu, "-L", f"{folder}/cpu/{cpu}", *plugin),
        *(word for key, value in variables.items() for word in ("-E", f"{key}={value}")),
        f"{folder}/sysroot/usr/bin/{setup['python']}",
    ]


def _instructions(counts: Path) -> dict[int, float]:
    """Instructions of one inference of each model.

    The file has a line "model count" for every pair of marks: first those with nothing between
    them, then as many with one inference.  The least counts, since what else a Python does now
    and then only adds.
    """
    found: dict[int, list[int]] = {}
    if counts.exists():
        for line in counts.read_text().splitlines():
            number, count = map(int, line.split())
            found.setdefault(number, []).append(count)
    return {
        number: float(min(several[-_COUNTED_RUNS:]) - min(several[:_COUNTED_RUNS]))
        for number, several in found.items()
        if len(several) >= 2 * _COUNTED_RUNS
    }


def _how() -> str | None:
    """The commands that set it up; None where this is not Debian's kind of system."""
    system = packages(*NEEDED)
    if system is None:
        return None
    return _INSTALL if shutil.which("qemu-aarch64") else f"{system} && {_INSTALL}"


def _folder() -> Path:
    return folder_of("arm64")


def _setup() -> dict[str, Any]:
    """What the program that sets it up wrote down.

    Raises:
        InputError: it is not set up, or there is no qemu.
    """
    file = _folder() / "setup.json"
    try:
        setup: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"not set up, {file} is not there") from error
    if shutil.which("qemu-aarch64") is None:
        raise InputError("no qemu-aarch64 on the PATH")
    return setup
