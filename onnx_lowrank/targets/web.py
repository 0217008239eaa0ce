"""``web``, ``web-chromium``, ``web-webgpu``: onnxruntime-web.

| name | where | times |
|---|---|---|
| ``web`` | WebAssembly in Node | real |
| ``web-chromium`` | WebAssembly in a headless Chromium | real |
| ``web-webgpu`` | WebGPU in a headless Chromium, in software (SwiftShader) | mean nothing |

``onnx-lowrank providers --install web`` installs the npm package in the user's cache or where
``ONNX_LOWRANK_WEB`` says; a browser is one of chromium, chromium-browser and google-chrome on the
PATH, or ``ONNX_LOWRANK_BROWSER``.

Both ways run ``web_core.mjs`` on a folder with ``job.json``: models [{"file", "external": [{"path",
"file"}]}], feeds [[{"name", "type", "dims", "file"}]] with the bytes of every array in a file (of
strings: JSON), "provider" "wasm" or "webgpu", and the rest as in
`onnx_lowrank.targets.base.Job`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from onnx_lowrank.errors import InputError, UsageError, named
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.progress import Advance
from onnx_lowrank.targets import runner, web_hosts
from onnx_lowrank.targets.base import (
    Job,
    Offer,
    Outcome,
    Target,
)
from onnx_lowrank.targets.packing import model_files
from onnx_lowrank.targets.setup import folder_of, hint, packages

__all__ = ["KINDS", "WebTarget", "create", "offers"]

_INSTALL = "onnx-lowrank providers --install web"
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_TYPES = {"float32", "float64", "float16", "bool", "string"} | {
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}


KINDS = frozenset({"web", "web-chromium", "web-webgpu"})


def create(name: str) -> Target:
    """The target of ``web``, ``web-chromium`` or ``web-webgpu``.

    Raises:
        InputError: Node, the package or a browser is missing.
        UsageError: the name has options.
    """
    kind, question, _ = name.partition("?")
    if question:
        raise UsageError(f"{named('targets', name)}: {kind} takes no options")
    for offer in offers():
        if offer.name == kind and not offer.usable:
            raise InputError(f"{named('targets', name)}: {offer.found}{hint(offer.install)}")
    return WebGpuTarget(name) if kind == "web-webgpu" else WebTarget(name)


def offers() -> list[Offer]:
    """Node and the browsers, with what each needs."""
    library, version = _library(), None
    if library is not None:
        with contextlib.suppress(OSError, ValueError, KeyError):
            package = json.loads((library / "package.json").read_text(encoding="utf-8"))
            version = f"onnxruntime-web {package['version']}"
    node, browser = shutil.which("node"), _browser()
    found = []
    for name, program, wanted, install in (
        ("web", node, "node", packages("nodejs", "npm")),
        ("web-chromium", browser, "chromium", packages("chromium", "npm")),
        ("web-webgpu", browser, "chromium", packages("chromium", "npm")),
    ):
        times = "emulated" if name == "web-webgpu" else "real"
        commands = [] if program or install is None else [install]
        if version is None:
            commands.append(_INSTALL)
        if program is None or version is None:
            missing = [] if program else [f"no {wanted} on the PATH"]
            missing += [] if version else [f"no onnxruntime-web in {folder_of('web')}"]
            why, how = " and ".join(missing), " && ".join(commands) or None
            found.append(Offer(name, False, version, why, times, how))
        else:
            where = f"{program}, SwiftShader" if name == "web-webgpu" else str(program)
            found.append(Offer(name, True, version, where, times, None))
    return found


class WebTarget(Target):
    """WebAssembly, in Node or in a browser."""

    own = "CPUExecutionProvider"

    def run(
        self, models: Sequence[Path], feeds: Sequence[Feed], job: Job, advance: Advance
    ) -> tuple[Outcome, ...]:
        """Run a job there.

        Raises:
            InputError: nothing runs there, an input is of a type that it has not, or the time is
                up.
        """
        where = named("targets", self.name)
        library = _library()
        if library is None:
            raise InputError(f"{where}: no onnxruntime-web in {folder_of('web')}; {_INSTALL}")
        with _packed(models, feeds, job, self._provider(), where) as folder:
            try:
                if self.name == "web":
                    answer = web_hosts.in_node(folder, library, len(models), job, advance)
                else:
                    answer = web_hosts.in_browser(
                        str(_browser()), folder, library, job, advance, webgpu=self.emulated
                    )
            except web_hosts.HostError as error:
                raise InputError(f"{where}: {error}") from error
            about = answer.get("about", {}).get("adapter")
            notes = (f"adapter {about}",) if about else ()
            return tuple(
                self._outcome(folder, model, entry, notes)
                for model, entry in zip(models, answer["models"], strict=True)
            )

    def _provider(self) -> str:
        return "wasm"

    def _nodes(self, model: Path, entry: Mapping[str, Any]) -> dict[str, tuple[str, ...]] | None:
        """All: WebAssembly has no other provider than ONNX Runtime's own kernels."""
        return {"CPUExecutionProvider": _node_names(model)} if "load_ns" in entry else None

    def _outcome(
        self, folder: Path, model: Path, entry: Mapping[str, Any], notes: tuple[str, ...]
    ) -> Outcome:
        emulated = self.emulated
        return Outcome(
            outputs=tuple(_read_outputs(folder / "result", sample) for sample in entry["outputs"]),
            times_ns=() if emulated else tuple(entry.get("times_ns", ())),
            load_ns=None if emulated else entry.get("load_ns"),
            first_ns=None if emulated else entry.get("first_ns"),
            peak_bytes=entry.get("peak_bytes"),
            nodes=self._nodes(model, entry),
            error=entry.get("error"),
            notes=(*entry["notes"], *notes),
            half=None if emulated else False,
        )


class WebGpuTarget(WebTarget):
    """WebGPU in a browser, on SwiftShader."""

    emulated = True
    own = "WebGpuExecutionProvider"

    def run(
        self, models: Sequence[Path], feeds: Sequence[Feed], job: Job, advance: Advance
    ) -> tuple[Outcome, ...]:
        """Run a job there, without timing it.

        Raises:
            InputError: as in `WebTarget.run`.
        """
        untimed = Job(outputs=job.outputs, threads=1, strict=job.strict, seconds=job.seconds)
        return super().run(models, feeds, untimed, advance)

    def _provider(self) -> str:
        return "webgpu"

    def _nodes(self, model: Path, entry: Mapping[str, Any]) -> dict[str, tuple[str, ...]] | None:
        nodes = entry.get("nodes")
        if nodes is None:
            return None
        return {
            provider: _node_names(model) if names is None else tuple(names)
            for provider, names in nodes.items()
        }


@contextlib.contextmanager
def _packed(
    models: Sequence[Path], feeds: Sequence[Feed], job: Job, provider: str, where: str
) -> Iterator[Path]:
    """A folder with the job, which is gone afterwards."""
    if not len(feeds):
        raise InputError("expected at least one sample, got none")
    with tempfile.TemporaryDirectory(prefix="onnx-lowrank-") as name:
        folder = Path(name)
        (folder / "result").mkdir()
        described = []
        for model in models:
            (_, path), *external = model_files(model)
            described.append(
                {
                    "file": str(path.resolve()),
                    "external": [
                        {"path": inside, "file": str(part.resolve())} for inside, part in external
                    ],
                }
            )
        content = {
            **asdict(job),
            "models": described,
            "feeds": [
                [
                    _write_input(folder, f"feed{number}-{place}.bin", key, array, where)
                    for place, (key, array) in enumerate(feed.items())
                ]
                for number, feed in enumerate(feeds)
            ],
            "provider": provider,
            "most_feeds": runner.MOST_FEEDS,
        }
        (folder / "job.json").write_text(json.dumps(content), encoding="utf-8")
        yield folder


def _write_input(folder: Path, file: str, name: str, array: Array, where: str) -> dict[str, Any]:
    array = np.asarray(array, order="C")
    kind = "string" if array.dtype.kind in "OU" else array.dtype.name
    if kind not in _TYPES:
        raise InputError(f"{where}: input {name!r}: onnxruntime-web has no {kind}")
    if kind == "string":
        data = json.dumps(array.reshape(-1).tolist()).encode()
    else:
        data = array.astype(array.dtype.newbyteorder("<")).tobytes()
    (folder / file).write_bytes(data)
    return {"name": name, "type": kind, "dims": list(array.shape), "file": file}


def _read_outputs(folder: Path, sample: Sequence[Mapping[str, Any]]) -> Feed:
    outputs: dict[str, Array] = {}
    for item in sample:
        data = (folder / Path(item["file"]).name).read_bytes()
        if item["type"] == "string":
            array = np.array(json.loads(data), dtype=object)
        else:
            array = np.frombuffer(data, np.dtype(item["type"])).copy()
        outputs[item["name"]] = array.reshape(item["dims"])
    return outputs


def _node_names(model: Path) -> tuple[str, ...]:
    """The nodes of the main graph as the file has them."""
    import onnx

    try:
        proto = onnx.load(model, load_external_data=False)
    except Exception:  # in ONNX Runtime's own format
        return ()
    return tuple(node.name or node.op_type for node in proto.graph.node)


def _library() -> Path | None:
    library = folder_of("web") / "node_modules" / "onnxruntime-web"
    return library if (library / "dist" / "ort.node.min.mjs").is_file() else None


def _browser() -> str | None:
    given = os.environ.get("ONNX_LOWRANK_BROWSER")
    if given:
        return shutil.which(given)
    return next(filter(None, map(shutil.which, _BROWSERS)), None)
