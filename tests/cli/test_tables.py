"""The tables of every verb on terminals of 80 and 60 columns, and in a pipe."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from onnx_lowrank.cli.curve import print_curve
from onnx_lowrank.cli.screen import Screen
from onnx_lowrank.cli.tables import (
    print_bench_report,
    print_check_report,
    print_offers,
    print_outputs,
    print_support,
)
from onnx_lowrank.compression.sweep_report import Point, SweepReport
from onnx_lowrank.evaluation.bench import BenchReport, ModelBench, Noise, Ratio, TargetBench
from onnx_lowrank.evaluation.check import CheckReport, ModelOnTarget, TargetCheck
from onnx_lowrank.schema.measures import OutputCheck
from onnx_lowrank.targets.base import Offer
from onnx_lowrank.targets.support import Left, ModelSupport, Support, SupportReport
from tests.helpers.screens import shown

PLACE = "decoder.layers"
WIDTHS = (80, 60, None)


def outputs(count: int) -> tuple[OutputCheck, ...]:
    return tuple(
        OutputCheck(f"{PLACE}.{n}.self_attn.present_key_value", 0.125, n / 1000, 0.99999, 0.9375)
        for n in range(count)
    )


def check_report() -> CheckReport:
    model = ModelOnTarget("model.onnx", None, {}, "147 of 147 nodes on CPU", {}, ())
    other = ModelOnTarget("small.onnx", None, {}, "9 of 159 nodes on CPU", {}, outputs(3))
    entry = TargetCheck("qnn", True, outputs(40), (model, other))
    note = "input_ids, attention_mask: [1, 64] (assumed batch=1, length=64; set with --dim)"
    return CheckReport("t", ("model.onnx", "small.onnx"), "random", 16, (entry,), notes=(note,))


def bench_report() -> BenchReport:
    names = [f"a_long_name_of_a_model_that_was_made_with_keep_0.{n}.onnx" for n in (9, 8, 7)]
    models = tuple(
        ModelBench(
            name, None, 50, 123.4, 234.5, 345.6, 1234.5, 200.1, 180_000_000, {},
            "147 of 147 nodes on CPU", 0, {"instructions": 123456789.0},
        )
        for name in names
    )  # fmt: skip
    ratio = Ratio(names[0], names[1], 1.4, 1.3, 1.5)
    entry = TargetBench("cpu", False, 1, models, (ratio,))
    noise = Noise(0.01, 5.3, 2)
    return BenchReport("t", "random", {"input_ids": (1, 64)}, (entry,), noise, ())


def support_report() -> SupportReport:
    left = tuple(
        Left(f"/{PLACE}/{n}/{kind}", kind, f"{kind} is not among its operators")
        for n in range(9)
        for kind in ("Gather", "Add", "Where", "Erf", "Shape", "Concat", "Slice")
    )
    model = ModelSupport(242, 242 - len(left), 33, left)
    names = ("coreml (NeuralNetwork)", "nnapi", "webgpu")
    entries = tuple(Support(name, True, model, model) for name in names)
    return SupportReport("t", "small.onnx", "model.onnx", entries, ())


def curve() -> SweepReport:
    points = tuple(
        Point(
            keep, 1_234_567_890, 987_654_321, 876_543_210, 12_345_678_901, 1.25, (1.2, 1.3),
            "faster", 0.000123, 0.0002, 0.000234, 0.0153, 0.99989, 0.0123, None,
        )
        for keep in (1.0, 0.8, 0.5)
    )  # fmt: skip
    return SweepReport("t", None, "top1", "data.npz", 16, "CPU", 1, points, (), ())


OFFERS = (
    Offer("cpu", True, "1.32.0", "built into the installed onnxruntime", "real", None),
    Offer(
        "qemu-arm64", True, "onnxruntime 1.32.0 for aarch64, qemu-aarch64 7.2", "here", "emulated",
        None,
    ),
    Offer(
        "openvino", False, None, "the plugin offers no device on this machine", "real",
        "pip install 'onnx-lowrank[openvino]'",
    ),
)  # fmt: skip
SHOWN: dict[str, tuple[Callable[[Screen], object], int]] = {
    "outputs": (lambda screen: print_outputs(outputs(50), screen), 24),
    "check": (lambda screen: print_check_report(check_report(), screen), 38),
    "bench": (lambda screen: print_bench_report(bench_report(), screen), 20),
    "support": (lambda screen: print_support(support_report(), screen, every=False), 40),
    "sweep": (lambda screen: print_curve(curve(), (), screen), 10),
    "providers": (lambda screen: print_offers(OFFERS, screen), 14),
}


@pytest.mark.parametrize("width", [80, 60])
@pytest.mark.parametrize("verb", SHOWN)
def test_a_terminal_holds_it(verb: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    show, most = SHOWN[verb]
    lines = shown(show, width, monkeypatch)
    assert max(map(len, lines)) <= width
    assert len(lines) <= most


@pytest.mark.parametrize("verb", SHOWN)
def test_a_pipe_has_all_of_it(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    show, _ = SHOWN[verb]
    text = "\n".join(shown(show, None, monkeypatch))
    assert "…" not in text
    assert "no room" not in text
    whole = {
        "outputs": [output.name for output in outputs(50)],
        "check": [output.name for output in outputs(40)],
        "bench": [model.model for model in bench_report().targets[0].models],
        "support": ["Slice is not among its operators", "and 8 more Slice"],
        "sweep": ["12,345,678,901", "1.25× (1.20–1.30)", "0.99989", "0.000234", "0.000123"],
        "providers": [offer.found for offer in OFFERS],
    }[verb]
    assert [part for part in whole if part not in text] == []


def test_the_outputs_that_are_furthest_off_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(lambda screen: print_outputs(outputs(50), screen), 80, monkeypatch)
    assert [line.split()[2] for line in lines[1:21]] == [f"{n / 1000:.3g}" for n in range(30, 50)]
    assert lines[-1] == "30 more outputs, nearer than these; --all-rows shows them"
    every = shown(lambda screen: print_outputs(outputs(50), screen), 80, monkeypatch, every=True)
    assert len(every) == 51


def test_kinds_of_nodes_are_counted_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    show, _ = SHOWN["support"]
    lines = shown(show, 80, monkeypatch)
    assert lines.count("  27 nodes of other kinds; --nodes names every node") == 3
