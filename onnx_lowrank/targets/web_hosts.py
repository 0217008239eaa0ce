"""Where `onnx_lowrank.targets.web` runs a job: processes of Node, or a headless browser."""

from __future__ import annotations

import contextlib
import http.server
import json
import math
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote

from onnx_lowrank.progress import Advance
from onnx_lowrank.targets.base import Job

__all__ = ["HostError", "in_browser", "in_node"]

_HERE = Path(__file__).parent
_TYPES = {".mjs": "text/javascript", ".html": "text/html", ".wasm": "application/wasm"}
_OPENING = 120.0
"""Seconds that a browser may take to open the page."""
_SILENCE = 900.0
"""Seconds without a request from the page after which it is taken for dead."""
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--no-first-run",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
)
_SWIFTSHADER = (
    "--enable-unsafe-webgpu",
    "--enable-features=Vulkan",
    "--use-webgpu-adapter=swiftshader",
    "--use-vulkan=swiftshader",
)


class HostError(Exception):
    """Why nothing runs there, in one line."""


def in_node(folder: Path, library: Path, models: int, job: Job, advance: Advance) -> dict[str, Any]:
    """Run each model in a process of its own, and the timing in another.

    Args:
        folder: the job.
        library: the npm package.
        models: how many there are.
        job: what is wanted.
        advance: as in `onnx_lowrank.targets.base.Target.run`.

    Raises:
        HostError: Node does not start, or the time is up.
    """
    end = time.monotonic() + (job.seconds or math.inf)
    found = []
    for index in range(models):
        said = _node(folder, library, ["solo", str(index)], job, end, advance)
        file = folder / "result" / f"model{index}.json"
        empty = {"notes": [], "outputs": [], "error": said}
        found.append(json.loads(file.read_text("utf-8")) if file.exists() else empty)
    timed = [index for index, entry in enumerate(found) if "error" not in entry]
    if job.iterations and timed:
        said = _node(folder, library, ["timing", *map(str, timed)], job, end, advance)
        file = folder / "result" / "timing.json"
        times = json.loads(file.read_text("utf-8")) if file.exists() else {}
        for index in timed:
            if times:
                found[index]["times_ns"] = times[str(index)]
            else:
                found[index]["error"] = f"timing: {said}"
    return {"models": found}


def _node(
    folder: Path, library: Path, words: Sequence[str], job: Job, end: float, advance: Advance
) -> str:
    """Run Node once; how it ended."""
    command = ["node", str(_HERE / "web_node.mjs"), str(folder), str(library), *words]
    pipe = subprocess.PIPE
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=errors, start_new_session=True
            )
        except OSError as error:
            raise HostError(f"node does not start: {error.strerror}") from error
        with _stopped(process, end), process:
            assert process.stdout is not None
            for line in process.stdout:
                if line == b"advance\n":
                    advance(1)
            code = process.wait()
        if time.monotonic() >= end:
            raise HostError(f"not done within {job.seconds:g} s")
        return _last_line(errors) or f"node ended with status {code}"


class _stopped(contextlib.AbstractContextManager[None]):  # noqa: N801 - read as a phrase
    """Kill a process and its children at a time, and when the block ends."""

    def __init__(self, process: subprocess.Popen[bytes], end: float) -> None:
        self._process = process
        self._timer = None
        if end < math.inf:
            self._timer = threading.Timer(max(0.0, end - time.monotonic()), self._kill)
            self._timer.daemon = True
            self._timer.start()

    def _kill(self) -> None:
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._process.poll() is None:
            self._kill()
        self._process.wait()


def _last_line(errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = errors.read()[-20000:].decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip() if lines else ""


class _Server(http.server.ThreadingHTTPServer):
    """Gives a page the job, and takes what it finds."""

    daemon_threads = True

    def __init__(self, folder: Path, library: Path, advance: Advance) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.library, self.advance = folder, library, advance
        content = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        models = content["models"]
        # What may be read: nothing but the job.
        self.files = {"job.json"} | {item["file"] for feed in content["feeds"] for item in feed}
        self.files |= {model["file"] for model in models}
        self.files |= {part["file"] for model in models for part in model["external"]}
        self.answer: dict[str, Any] | None = None
        self.heard: float | None = None
        self.done = threading.Event()
        self.failure: BaseException | None = None

    def handle_error(self, *_: object) -> None:
        """Say nothing: the browser hangs up in the middle when it is ended."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:  # nothing on standard error
        pass

    def do_GET(self) -> None:
        self.server.heard = time.monotonic()
        kind, _, name = unquote(self.path).removeprefix("/").partition("/")
        path = None
        if kind == "file" and name in self.server.files:
            path = self.server.folder / name  # an absolute name stays as it is
        elif kind == "dist" and "/" not in name:
            path = self.server.library / "dist" / name
        elif kind in ("", "core.mjs"):
            path = _HERE / ("web_core.mjs" if kind else "web_page.html")
        if path is None or not path.is_file():
            self._answer(404, b"", "text/plain")
            return
        self.send_response(200)
        self._headers(path.stat().st_size, _TYPES.get(path.suffix, "application/octet-stream"))
        with path.open("rb") as file, contextlib.suppress(OSError):
            while data := file.read(1 << 20):
                self.wfile.write(data)

    def do_POST(self) -> None:
        self.server.heard = time.monotonic()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind, _, name = unquote(self.path).removeprefix("/").partition("/")
        if kind == "result" and "/" not in name:
            (self.server.folder / "result" / name).write_bytes(body)
        elif kind == "advance":
            try:
                self.server.advance(1)
            except BaseException as error:  # handed to the thread that waits
                self.server.failure = error
                self.server.done.set()
        elif kind == "done":
            self.server.answer = json.loads(body)
            self.server.done.set()
        self._answer(200, b"", "text/plain")

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self._headers(len(body), kind)
        self.wfile.write(body)

    def _headers(self, size: int, kind: str) -> None:
        # Threads need a page that shares nothing with others.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(size))
        self.end_headers()


def in_browser(
    browser: str, folder: Path, library: Path, job: Job, advance: Advance, *, webgpu: bool
) -> dict[str, Any]:
    """Run all models in one page of a headless browser.

    Args:
        browser: the program.
        folder: the job.
        library: the npm package.
        job: what is wanted.
        advance: as in `onnx_lowrank.targets.base.Target.run`.
        webgpu: whether it is to have WebGPU, on SwiftShader.

    Raises:
        HostError: the browser or the page does not start, or the time is up.
    """
    end = time.monotonic() + (job.seconds or math.inf)
    with (
        tempfile.TemporaryDirectory(prefix="onnx-lowrank-", ignore_cleanup_errors=True) as profile,
        _Server(folder, library, advance) as server,
        tempfile.TemporaryFile() as errors,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/"
        flags = [*_FLAGS, *(_SWIFTSHADER if webgpu else ()), f"--user-data-dir={profile}"]
        try:
            process = subprocess.Popen(
                [browser, *flags, address],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
                env={**os.environ, "HOME": profile},  # it leaves nothing in the user's
            )
        except OSError as error:
            raise HostError(f"{browser} does not start: {error.strerror}") from error
        try:
            with _stopped(process, math.inf):
                _wait(server, process, end, job, errors)
        finally:
            server.shutdown()
    if server.failure is not None:
        raise server.failure
    answer = server.answer or {"fault": "no answer"}
    if "fault" in answer:
        raise HostError(str(answer["fault"]))
    return answer


def _wait(
    server: _Server, process: subprocess.Popen[bytes], end: float, job: Job, errors: IO[bytes]
) -> None:
    start = time.monotonic()
    while not server.done.wait(0.2):
        now = time.monotonic()
        if now >= end:
            raise HostError(f"not done within {job.seconds:g} s")
        if process.poll() is not None:
            said = _last_line(errors)
            raise HostError(f"the browser ended with status {process.returncode}: {said}")
        if server.heard is None and now - start > _OPENING:
            raise HostError(f"the browser did not open the page within {_OPENING:g} s")
        if server.heard is not None and now - server.heard > _SILENCE:
            raise HostError(f"nothing was heard from the page for {_SILENCE:g} s")
