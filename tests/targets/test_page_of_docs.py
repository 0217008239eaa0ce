"""The page of docs/pipelines.md, in a browser: the smaller model with onnxruntime-web."""

from __future__ import annotations

import functools
import os
import re
import shutil
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from onnx_lowrank import compress
from onnx_lowrank.targets.setup import folder_of
from tests.helpers.chromium import opened
from tests.helpers.models import known_rank, parse
from tests.helpers.places import ROOT

_SECONDS = 60.0


class Quiet(SimpleHTTPRequestHandler):
    def guess_type(self, path: str | os.PathLike[str]) -> str:
        return "text/javascript" if str(path).endswith(".mjs") else super().guess_type(path)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.web
def test_the_page_answers_as_the_model_does(tmp_path: Path) -> None:
    dist = folder_of("web") / "node_modules" / "onnxruntime-web" / "dist"
    if not dist.is_dir():
        pytest.skip("onnxruntime-web is not set up: tools/setup_web.py")
    rng = np.random.default_rng(0)
    model = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        classifier (float[batch, 64] x) => (float[batch, 10] logits) {
            a = MatMul(x, W1)
            b = Relu(a)
            logits = MatMul(b, W2)
        }""",
        {"W1": known_rank(64, 128, 12, rng), "W2": known_rank(128, 10, 8, rng)},
    )
    result = compress(model, energy=0.999, simplify=False, check=False, bench=False)
    result.save(tmp_path / "small.onnx")
    session = ort.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"x": np.full((1, 64), 0.5, np.float32)})
    page = (ROOT / "docs" / "pipelines.md").read_text(encoding="utf-8")
    (html,) = re.findall(r"^```html\n(.*?)^```$", page, re.M | re.S)
    (tmp_path / "index.html").write_text(html, encoding="utf-8")
    for file in dist.glob("ort*"):
        if file.suffix in (".mjs", ".wasm") and ("bundle" in file.name or "simd" in file.name):
            shutil.copyfile(file, tmp_path / file.name)
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, opened() as tab:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tab.visit(f"http://127.0.0.1:{server.server_port}/index.html")
        end = time.monotonic() + _SECONDS
        answer = "…"
        while answer in ("…", None):
            assert time.monotonic() < end, tab.complaints
            time.sleep(0.1)
            answer = tab.run("document.getElementById('answer')?.textContent ?? null")
        server.shutdown()
    assert answer == f"class {int(logits.argmax())}"
    assert onnx.load(tmp_path / "small.onnx").graph.node  # the smaller model it is
