"""The pass for Olive, run by Olive itself where it is installed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.helpers.targets import save, two_layers

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("olive") is None, reason="Olive is not installed: extra [olive]"
)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save(two_layers("n"), tmp_path / "model.onnx")
    x = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x)
    return tmp_path


def run_olive(folder: Path, passes: dict[str, object], **more: object) -> list[Path]:
    """The models that Olive leaves."""
    from onnx_lowrank.compression.olive_pass import package_config

    config = {
        "input_model": {"type": "OnnxModel", "model_path": str(folder / "model.onnx")},
        "systems": {
            "local": {
                "type": "LocalSystem",
                "accelerators": [
                    {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}
                ],
            }
        },
        "passes": passes,
        "output_dir": str(folder / "out"),
        "cache_dir": str(folder / "cache"),
        "host": "local",
        "target": "local",
        **more,
    }
    (folder / "run.json").write_text(json.dumps(config))
    (folder / "package.json").write_text(json.dumps(package_config()))
    script = (
        "from olive.workflows import run\nimport sys\n"
        "run(sys.argv[1], package_config=sys.argv[2])\n"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(folder / "run.json"), str(folder / "package.json")],
        check=True,
        timeout=300,
    )
    return sorted((folder / "out").rglob("*.onnx"))


def test_it_is_a_pass_among_olives_own(place: Path) -> None:
    own = {"type": "OnnxLowRank", "keep": 0.6, "data": str(place / "data.npz"), "bench": False}
    quantized = {"type": "OnnxDynamicQuantization"}
    (found,) = run_olive(place, {"low": own, "quantize": quantized})
    operators = {node.op_type for node in onnx.load(found).graph.node}
    assert "DynamicQuantizeLinear" in operators
    products = [n for n in onnx.load(found).graph.node if n.op_type == "MatMulInteger"]
    assert len(products) == 4  # two maps, each a pair


def test_the_command_writes_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "package.json"
    module = "onnx_lowrank.compression.olive_pass"
    subprocess.run([sys.executable, "-m", module, str(file)], check=True, timeout=120)
    passes = json.loads(file.read_text())["passes"]
    assert passes["OnnxLowRank"]["module_path"] == f"{module}.OnnxLowRank"
    assert len(passes) > 20  # Olive's own are there


def test_parameters_can_be_searched() -> None:
    """Every one of them takes a SearchParameter; keep has values of its own to try."""
    from olive.hardware.accelerator import DEFAULT_CPU_ACCELERATOR
    from olive.search.search_parameter import Categorical

    from onnx_lowrank.compression.olive_pass import OnnxLowRank

    searched = {"energy": Categorical([0.9, 0.95]), "keep": None}
    for given, names in (({}, {"keep"}), (searched, {"energy"})):
        config = OnnxLowRank.generate_config(
            DEFAULT_CPU_ACCELERATOR, given, disable_search=False
        ).model_dump()
        assert {name for name, value in config.items() if isinstance(value, Categorical)} == names
    plain = OnnxLowRank.generate_config(DEFAULT_CPU_ACCELERATOR, {"keep": 0.5}, disable_search=True)
    assert plain.model_dump()["keep"] == 0.5
