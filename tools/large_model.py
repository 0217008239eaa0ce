"""Measure memory and time on models of several GB: ``python tools/large_model.py``.

Makes models of fully connected layers (1024 → 4096 → 1024 → …, float32, weights in an external
data file that is written layer by layer), runs the command on each in a process of its own with
``--no-simplify --no-check --no-bench``, and prints peak resident memory and time by size.  Files
go to a temporary folder, or to ``--folder``, and are removed afterwards.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

NARROW, WIDE = 1024, 4096
RANK = 256


def make_model(path: Path, layers: int) -> int:
    """Write a model with ``layers`` weights of 16 MB; its size in bytes."""
    rng = np.random.default_rng(0)
    data = path.with_name(path.name + ".data")
    initializers, nodes = [], []
    offset = 0
    with data.open("wb") as file:
        for index in range(layers):
            shape = (NARROW, WIDE) if index % 2 == 0 else (WIDE, NARROW)
            left = rng.standard_normal((shape[0], RANK), dtype=np.float32)
            right = rng.standard_normal((RANK, shape[1]), dtype=np.float32)
            noise = rng.standard_normal(shape, dtype=np.float32)
            weight = left @ right / np.float32(16 * RANK**0.5) + noise / 64
            tensor = TensorProto(
                name=f"W{index}",
                data_type=TensorProto.FLOAT,
                dims=shape,
                data_location=TensorProto.EXTERNAL,
            )
            for key, value in (
                ("location", data.name),
                ("offset", offset),
                ("length", weight.nbytes),
            ):
                tensor.external_data.add(key=key, value=str(value))
            file.write(weight.tobytes())
            offset += weight.nbytes
            initializers.append(tensor)
            nodes.append(
                helper.make_node(
                    "MatMul", [f"x{index}", f"W{index}"], [f"x{index + 1}"], name=f"layer{index}"
                )
            )
    width = NARROW if layers % 2 == 0 else WIDE
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, ["batch", NARROW])],
        [helper.make_tensor_value_info(f"x{layers}", TensorProto.FLOAT, ["batch", width])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path.stat().st_size + offset


def measure(source: Path, target: Path, options: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of one run of the command."""
    command = [
        sys.executable, "-m", "onnx_lowrank", str(source), str(target),
        "--no-simplify", "--no-check", "--no-bench", "--force", *options,
    ]  # fmt: skip
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status != 0:
        raise SystemExit(f"{' '.join(command)}: failed with status {status}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Print one line for each size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("options", nargs="*", default=["--energy", "0.9"])
    arguments = parser.parse_args()
    print("layers  model GB  OUT GB  seconds  s/layer  peak resident GB")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        for layers in arguments.layers:
            source, target = Path(name) / "in.onnx", Path(name) / "out.onnx"
            size = make_model(source, layers)
            seconds, peak = measure(source, target, arguments.options)
            out = sum(file.stat().st_size for file in Path(name).glob("out.onnx*"))
            print(
                f"{layers:6d}  {size / 1e9:8.2f}  {out / 1e9:6.2f}  {seconds:7.1f}  "
                f"{seconds / layers:7.2f}  {peak / 1e9:16.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
