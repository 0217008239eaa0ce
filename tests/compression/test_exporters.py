"""Models as real exporters, optimizers and converters write them: each goes through and runs.

They come from models/get.py; one that is not there is skipped.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.checker
import onnx.helper
import onnx.numpy_helper
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnx_lowrank import Report, compress
from onnx_lowrank.graph.validity import invalid
from onnx_lowrank.numerics.arrays import Array
from tests.helpers.models import distance, op_types
from tests.helpers.places import CACHE


def obtain(name: str) -> Path:
    path = CACHE / f"{name}.onnx"
    if not path.is_file():
        pytest.skip(f"{name} is not here: python models/get.py {name}")
    return path


# --- what is made here


def optimized(source: Path, folder: Path) -> Path:
    """The offline optimizer of ONNX Runtime: the file that it saves."""
    path = folder / "optimized.onnx"
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return path


def transformer(source: Path, folder: Path) -> Path:
    """The transformer optimizer of ONNX Runtime, which fuses whole attentions."""
    pytest.importorskip("torch", reason="ONNX Runtime's transformer optimizer needs torch")
    optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
    path = folder / "transformer.onnx"
    model = optimizer.optimize_model(str(source), "bert", num_heads=12, hidden_size=384)
    model.save_model_to_file(str(path))
    return path


def half(source: Path, folder: Path) -> Path:
    """float16, by onnxconverter-common."""
    float16 = pytest.importorskip(
        "onnxconverter_common.float16", reason="onnxconverter-common is not installed"
    )
    path = folder / "half.onnx"
    onnx.save(float16.convert_float_to_float16(onnx.load(source), keep_io_types=True), path)
    return path


def dynamically_quantized(source: Path, folder: Path) -> Path:
    """int8 with MatMulInteger."""
    quantization = pytest.importorskip("onnxruntime.quantization")
    path = folder / "dynamic.onnx"
    quantization.quantize_dynamic(source, path)
    return path


def quantize_dequantize(source: Path, folder: Path) -> Path:
    """Weights in int8 with a DequantizeLinear behind each, as in the QDQ format."""
    model = onnx.load(source)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            tensor = tensors.pop(node.input[1])
            weight = onnx.numpy_helper.to_array(tensor)
            scale = np.asarray(np.abs(weight).max() / 127, np.float32)
            name = tensor.name
            tensor.CopyFrom(
                onnx.numpy_helper.from_array(np.round(weight / scale).astype(np.int8), f"{name}_q")
            )
            model.graph.initializer.append(onnx.numpy_helper.from_array(scale, f"{name}_scale"))
            inputs = [f"{name}_q", f"{name}_scale"]
            nodes.append(onnx.helper.make_node("DequantizeLinear", inputs, [name]))
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    path = folder / "qdq.onnx"
    onnx.save(model, path)
    return path


def with_functions(source: Path, folder: Path) -> Path:
    """Every feed-forward block a model-local function with its weights inside."""
    model = onnx.load(source)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    for index, node in enumerate(list(model.graph.node)):
        if node.op_type != "MatMul" or node.input[1] not in tensors or "dense" not in node.name:
            continue
        body = [
            onnx.helper.make_node("Constant", [], ["W"], value=tensors[node.input[1]]),
            onnx.helper.make_node("MatMul", ["x", "W"], ["y"], name="dense"),
        ]
        imports = [onnx.helper.make_opsetid("", 17)]
        model.functions.append(
            onnx.helper.make_function("local", f"dense_{index}", ["x"], ["y"], body, imports)
        )
        model.graph.initializer.remove(tensors.pop(node.input[1]))
        del node.input[1]
        node.op_type, node.domain = f"dense_{index}", "local"
    assert producers
    model.opset_import.append(onnx.helper.make_opsetid("local", 1))
    model.ir_version = max(model.ir_version, 8)
    path = folder / "functions.onnx"
    onnx.save(model, path)
    return path


MAKE: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "ONNX Runtime's optimizer": (optimized, "minilm-l3"),
    "ONNX Runtime's optimizer, MLP": (optimized, "mlp-sklearn"),
    "ONNX Runtime's transformer optimizer": (transformer, "minilm-l3"),
    # The converter makes an invalid model of minilm-l3, whose mask is an integer and is cast.
    "float16": (half, "minilm-l3-static"),
    "dynamic int8": (dynamically_quantized, "minilm-l3"),
    "QDQ": (quantize_dequantize, "minilm-l3"),
    "functions": (with_functions, "minilm-l3"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The path of a model that is made of another, once."""

    @functools.cache
    def make(name: str) -> Path:
        make_it, source = MAKE[name]
        return make_it(obtain(source), tmp_path_factory.mktemp("made"))

    return make


# --- what is asked of every one of them


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 2
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


SIZES = {"?": 48, "p2o.DynamicDimension.1": 320, "d1": 320, "sequence_length": 16, "length": 16}


def feeds(path: Path) -> dict[str, Array]:
    """Two samples' worth of random input of the shapes that the model asks for."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Array] = {}
    for item in session(path).get_inputs():
        shape = [d if isinstance(d, int) and d > 0 else SIZES.get(d, 2) for d in item.shape]
        if item.type == "tensor(int64)":
            array = np.ones(shape) if "mask" in item.name else rng.integers(100, 20000, shape)
            arrays[item.name] = array.astype(np.int64)
        elif item.type == "tensor(int32)":
            arrays[item.name] = rng.integers(0, 256, shape).astype(np.int32)
        else:
            kind = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[item.type]
            arrays[item.name] = rng.uniform(0, 1, shape).astype(kind)
    return arrays


def go_through(path: Path, out: Path, **options: Any) -> Report:
    """Compress it; the result passes the checker, runs, and every layer has a status."""
    report = compress(path, check=True, bench=False, samples=1, **options).save(out)
    assert report.check is not None, report.notes
    onnx.checker.check_model(out, full_check=invalid_input(path))
    runner = session(out)
    for array in runner.run(None, feeds(path)):
        assert np.asarray(array).size
    for layer in report.layers:
        assert layer.status in ("factored", "dense")
        assert layer.reason
        assert (layer.status == "factored") == (layer.rank is not None)
    if "min_gain" not in options and not options.get("simplify"):
        assert report.totals.parameters_after <= report.totals.parameters_before
    return report


def invalid_input(path: Path) -> bool:
    """Whether the original passes the checker with full shape inference, too."""
    return invalid(ir.load(path)) is None


def constant_maps(path: Path) -> int:
    """MatMul, Gemm and their fused kin with an initializer or Constant of two or more axes."""
    model = onnx.load(path)
    constants = {t.name for t in model.graph.initializer if len(t.dims) > 1}
    constants |= {n.output[0] for n in model.graph.node if n.op_type == "Constant"}
    kinds = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Attention")
    return sum(
        node.op_type in kinds and any(name in constants for name in node.input[:2])
        for node in model.graph.node
    )


REAL = [
    pytest.param("mlp-torchscript", marks=pytest.mark.slow),
    pytest.param("mlp-dynamo", marks=pytest.mark.slow),
    pytest.param("minilm-l3", marks=pytest.mark.slow),
    pytest.param("minilm-l3-static", marks=pytest.mark.slow),
    pytest.param("minilm-l6", marks=pytest.mark.slow),
    pytest.param("minilm-l6-dynamo", marks=pytest.mark.slow),
    pytest.param("captcha", marks=pytest.mark.slow),
    pytest.param("cnn", marks=pytest.mark.slow),
    "vit",
    "magika",
    "mlp-sklearn",
    pytest.param("ppocrv4-rec", marks=pytest.mark.slow),
    pytest.param("ppocrv5-rec", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("simplify", [False, True], ids=["as it is", "simplified"])
def test_a_real_model_at_energy_0_9(name: str, simplify: bool, tmp_path: Path) -> None:
    path, out = obtain(name), tmp_path / "out.onnx"
    report = go_through(path, out, energy=0.9, simplify=simplify)
    on = [layer for layer in report.layers if not layer.off]
    if not simplify:
        assert len(on) == constant_maps(path)
    assert on
    for layer in on:
        assert layer.shape is not None
        m, n = layer.shape
        assert layer.parameters_before == layer.slices * m * n
        if layer.status == "factored":
            assert layer.energy is not None
            assert layer.energy >= 0.9 - 1e-6
            assert layer.weight_error == pytest.approx(math.sqrt(1 - layer.energy), abs=2e-3)
    assert report.output.bytes <= report.input.bytes * 1.01


@pytest.mark.parametrize("name", REAL)
def test_a_real_model_at_full_energy(name: str, tmp_path: Path) -> None:
    path, out = obtain(name), tmp_path / "out.onnx"
    report = go_through(path, out, energy=1.0, min_gain=-1, simplify=False)
    assert any(layer.status == "factored" for layer in report.layers)
    assert_agree(path, out, within=1e-4)


def assert_agree(path: Path, out: Path, within: float) -> None:
    given = feeds(path)
    names = [item.name for item in session(path).get_outputs()]
    before, after = (session(p).run(names, given) for p in (path, out))
    for name, expected, found in zip(names, before, after, strict=True):
        if isinstance(expected, np.ndarray) and expected.dtype.kind == "f":
            assert distance(found, expected) <= within, name


FULL_ENERGY = {
    "ONNX Runtime's optimizer": 1e-4,
    "ONNX Runtime's optimizer, MLP": 1e-4,
    "ONNX Runtime's transformer optimizer": 1e-4,
    "float16": 1e-2,
    "functions": 1e-4,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_ENERGY)
def test_a_made_model_agrees_at_full_energy(
    name: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    path, out = made(name), tmp_path / "out.onnx"
    report = go_through(path, out, energy=1.0, min_gain=-1, simplify=False)
    on = [layer for layer in report.layers if not layer.off]
    assert all(layer.status == "factored" for layer in on), [layer.reason for layer in on]
    assert len(on) >= (3 if "MLP" in name else 12)
    assert_agree(path, out, FULL_ENERGY[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_ENERGY)
@pytest.mark.parametrize("simplify", [False, True], ids=["as it is", "simplified"])
def test_a_made_model_at_energy_0_9(
    name: str, simplify: bool, made: Callable[[str], Path], tmp_path: Path
) -> None:
    report = go_through(made(name), tmp_path / "out.onnx", energy=0.9, simplify=simplify)
    factored = [layer for layer in report.layers if layer.status == "factored"]
    assert factored
    assert report.totals.linear_parameters_after < report.totals.linear_parameters_before
    assert report.output.bytes < report.input.bytes * 1.01


def test_fused_gemms_are_there_and_factored(made: Callable[[str], Path], tmp_path: Path) -> None:
    path = made("ONNX Runtime's optimizer, MLP")
    assert op_types(onnx.load(path)).count("FusedGemm") == 2
    report = go_through(path, tmp_path / "out.onnx", keep=0.4, simplify=False)
    forms = [layer.form for layer in report.layers if layer.status == "factored"]
    assert forms.count("fused-gemm-right") == 2


@pytest.mark.slow
def test_fused_operators_around_the_weights_are_left_alone(
    made: Callable[[str], Path], tmp_path: Path
) -> None:
    path, out = made("ONNX Runtime's optimizer"), tmp_path / "out.onnx"
    go_through(path, out, keep=0.4, simplify=False)
    before, after = (op_types(onnx.load(p)) for p in (path, out))
    for kind in ("BiasGelu", "FusedMatMul", "LayerNormalization", "Softmax"):
        assert after.count(kind) == before.count(kind) > 0


@pytest.mark.slow
def test_fused_attentions_are_there_and_factored(
    made: Callable[[str], Path], tmp_path: Path
) -> None:
    path = made("ONNX Runtime's transformer optimizer")
    assert op_types(onnx.load(path)).count("Attention") == 3
    report = go_through(path, tmp_path / "out.onnx", energy=0.9, simplify=False)
    packed = [layer for layer in report.layers if layer.form == "attention"]
    assert [layer.shape for layer in packed] == [(384, 1152)] * 3
    assert any(layer.status == "factored" for layer in packed)


@pytest.mark.slow
def test_factors_of_float16_are_float16(made: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    report = go_through(made("float16"), out, energy=0.9, simplify=False)
    assert any(layer.status == "factored" for layer in report.layers)
    kinds = {t.data_type for t in onnx.load(out).graph.initializer if "lowrank" in t.name}
    assert kinds == {onnx.TensorProto.FLOAT16}
    assert report.output.bytes < report.input.bytes


@pytest.mark.slow
@pytest.mark.parametrize("simplify", [False, True], ids=["as it is", "simplified"])
@pytest.mark.parametrize("name", ["dynamic int8", "QDQ"])
def test_quantized_models_are_left_as_they_are(
    name: str, simplify: bool, made: Callable[[str], Path], tmp_path: Path
) -> None:
    path, out = made(name), tmp_path / "out.onnx"
    report = go_through(path, out, energy=0.9, simplify=simplify)
    assert len([layer for layer in report.layers if not layer.off]) == 18
    for layer in report.layers:
        assert layer.status == "dense"
        assert layer.off or "factor the float model first, then quantize" in layer.reason
    assert any("nothing was replaced" in note for note in report.notes)
    assert report.output.bytes <= report.input.bytes * 1.02


@pytest.mark.slow
def test_weights_inside_functions_are_factored_there(
    made: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.onnx"
    report = go_through(made("functions"), out, energy=0.9, simplify=False)
    inside = [layer for layer in report.layers if layer.name == "dense"]
    assert len(inside) == 9
    model = onnx.load(out)
    factored = sum(layer.status == "factored" for layer in inside)
    assert factored
    bodies = [[node.op_type for node in function.node] for function in model.functions]
    assert bodies.count(["Constant", "Constant", "MatMul", "MatMul"]) == factored
    assert not any(
        "lowrank" in tensor.name and "dense" in tensor.name.split(".")[:1]
        for tensor in model.graph.initializer
    )


# --- adapters


def adapted_by_hand(torch: Any) -> Any:
    """Two maps with LoRA beside them, the scale behind one and before the other."""

    class Adapted(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, *, behind: bool) -> None:
            super().__init__()
            self.base = torch.nn.Linear(32, 32, bias=behind)
            self.first = torch.nn.Linear(32, 4, bias=False)
            self.second = torch.nn.Linear(4, 32, bias=False)
            self.dropout = torch.nn.Dropout(0.1)
            self.behind = behind

        def forward(self, x: Any) -> Any:
            if self.behind:
                return self.base(x) + self.second(self.first(self.dropout(x))) * 2.0
            return self.second(self.first(x * 0.5)) + self.base(x)

    return torch.nn.Sequential(Adapted(behind=True), torch.nn.Tanh(), Adapted(behind=False))


def adapted_by_peft(torch: Any) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    net = torch.nn.Sequential(
        torch.nn.Linear(32, 32), torch.nn.Tanh(), torch.nn.Linear(32, 32, bias=False)
    )
    wanted = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1, target_modules=["0", "2"])
    net = peft.get_peft_model(net, wanted)
    for name, parameter in net.named_parameters():
        if "lora_B" in name:  # zeros, before it was trained
            torch.nn.init.normal_(parameter, std=0.1)
    return net


@pytest.mark.slow
@pytest.mark.parametrize("made", [adapted_by_hand, adapted_by_peft])
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("shape", [(6, 32), (2, 3, 32)])
def test_adapters_are_one_map_with_their_weight(
    made: Callable[[Any], Any], dynamo: bool, shape: tuple[int, ...], tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch", reason="the extra [exporters] brings torch")
    pytest.importorskip("onnxscript", reason="the extra [exporters] brings onnxscript")
    torch.manual_seed(0)
    net, path = made(torch).eval(), tmp_path / "net.onnx"
    sample = torch.randn(*shape)
    names: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"], "verbose": False}
    torch.onnx.export(net, (sample,), path, dynamo=dynamo, **names)
    result = compress(path, rank=32, min_gain=-1, bench=False)
    assert [(layer.rank, layer.shape) for layer in result.report.layers] == [(32, (32, 32))] * 2
    assert result.report.check is not None
    assert result.report.check.providers[0].outputs[0].relative_l2 < 1e-5
    assert sum("2 adapters merged into" in note for note in result.report.notes) == 1
