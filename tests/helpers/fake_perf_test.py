"""Plays onnxruntime_perf_test: the same arguments and output, in Python, with a real session."""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from pathlib import Path

import onnx
import onnx.numpy_helper
import onnxruntime as ort


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("-e", dest="provider", required=True)
    parser.add_argument("-m", dest="mode", choices=["times"], required=True)
    parser.add_argument("-r", dest="runs", type=int, required=True)
    parser.add_argument("-x", dest="threads", type=int, default=0)
    parser.add_argument("-C", dest="config")
    parser.add_argument("-p", dest="profile")
    parser.add_argument("model", type=Path)
    parser.add_argument("times", type=Path)
    words = parser.parse_args()
    if os.environ.get("FAKE_PERF_TEST_SLEEPS"):
        time.sleep(600)
    if words.provider != "cpu":
        print(f"{words.provider} is not supported in this build", file=sys.stderr)
        return 1
    options = ort.SessionOptions()
    options.intra_op_num_threads = words.threads
    if words.profile:
        options.enable_profiling = True
        options.profile_file_prefix = words.profile
    start = time.perf_counter()
    try:
        session = ort.InferenceSession(str(words.model), options, ["CPUExecutionProvider"])
    except Exception as error:  # it prints what it got, and ends
        print(f"Exception: {error}", file=sys.stderr)
        return 255
    print(f"Session creation time cost: {time.perf_counter() - start:g} s")
    feeds = []
    for folder in sorted(words.model.parent.glob("test_data_set_*")):
        tensors = [onnx.load_tensor(path) for path in sorted(folder.glob("input_*.pb"))]
        feeds.append({tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in tensors})
    if not feeds:
        print(f"there is no test data for model {words.model}")
        return 255
    start = time.perf_counter()
    session.run(None, feeds[0])
    print(f"First inference time cost: {round((time.perf_counter() - start) * 1e3)} ms")
    costs = []
    for number in range(words.runs):
        start = time.perf_counter()
        session.run(None, feeds[number % len(feeds)])
        costs.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"Average inference time cost: {sum(costs) / len(costs) * 1e3:g} ms")
    print(f"Avg CPU usage: 98 %\nPeak working set size: {peak} bytes")
    with words.times.open("a") as file:
        for number, cost in enumerate(costs):
            file.write(f"{words.model.parent.name},{cost:g},{peak},98,{number}\n")
    if words.profile:
        session.end_profiling()
    return 0


if __name__ == "__main__":
    sys.exit(main())
