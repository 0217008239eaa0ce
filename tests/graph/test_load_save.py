"""Where models come from and go to: files, data files beside them, links, objects in memory."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx.external_data_helper
import onnx.numpy_helper
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnx_lowrank import InputError, UsageError, compress
from onnx_lowrank.compression.result import Result
from onnx_lowrank.graph.load import load
from onnx_lowrank.numerics.arrays import Array
from tests.helpers.models import (
    known_rank,
    linear_model,
    parameters,
    parse,
    run_ort,
    uniform,
    unsigned,
)

M, N = 96, 64
FAST = {"simplify": False, "check": False, "bench": False}


def weights() -> dict[str, Array]:
    return {
        name: known_rank(M, M, 8, np.random.default_rng(seed), scale=2**-4)
        for seed, name in enumerate(("U", "V", "W"))
    }


def three() -> onnx.ModelProto:
    text = f"""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, {M}] x) => (float[N, {M}] y) {{
        a = MatMul(x, U)
        b = MatMul(a, V)
        y = MatMul(b, W)
    }}"""
    return parse(text, weights())


def outputs(path: Path) -> Array:
    x = uniform([3, M], np.random.default_rng(9))
    result: Array = ort.InferenceSession(str(path)).run(None, {"x": x})[0]
    return result


def reference() -> Array:
    return run_ort(three(), {"x": uniform([3, M], np.random.default_rng(9))})["y"]


def run(path: Path, **options: object) -> Result:
    return compress(path, rank=8, **{**FAST, **options})  # type: ignore[arg-type]


def compressed(path: Path, out: Path) -> None:
    """Compress a file, with a check of the outputs, and compare them once more."""
    result = run(path, check=True, samples=1)
    assert [layer.rank for layer in result.report.layers] == [8, 8, 8]
    assert result.report.check is not None
    assert result.report.check.providers[0].outputs[0].relative_l2 < 1e-5
    result.save(out)
    np.testing.assert_allclose(outputs(out), reference(), rtol=1e-4, atol=1e-4)


def external(tensor: onnx.TensorProto) -> None:
    assert tensor.data_location == onnx.TensorProto.EXTERNAL


# Data files


def save_external(folder: Path, location: str = "model.onnx.data") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    onnx.save(three(), path, save_as_external_data=True, location=location, size_threshold=0)
    return path


def test_one_data_file(tmp_path: Path) -> None:
    compressed(save_external(tmp_path / "a"), tmp_path / "out.onnx")


def test_a_file_for_every_weight(tmp_path: Path) -> None:
    path = tmp_path / "in.onnx"
    onnx.save(
        three(), path, save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=0
    )
    source = load(path)
    assert {file.name for file in source.data_files} == {"U", "V", "W"}
    assert source.bytes == path.stat().st_size + 3 * 4 * M * M
    compressed(path, tmp_path / "out.onnx")


def test_data_in_a_folder_below(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    compressed(save_external(tmp_path, "weights/all.bin"), tmp_path / "out.onnx")


@pytest.mark.parametrize("gap", [0, 1, 4096])
def test_offsets_without_alignment_and_bytes_that_belong_to_nothing(
    gap: int, tmp_path: Path
) -> None:
    model = three()
    data = bytearray(b"?" * 3)
    for tensor in model.graph.initializer:
        onnx.external_data_helper.set_external_data(
            tensor, "w.bin", offset=len(data), length=len(tensor.raw_data)
        )
        data += tensor.raw_data + b"?" * gap
        tensor.ClearField("raw_data")
    (tmp_path / "w.bin").write_bytes(data)
    path = tmp_path / "in.onnx"
    path.write_bytes(model.SerializeToString())
    compressed(path, tmp_path / "out.onnx")


def test_neither_offset_nor_length(tmp_path: Path) -> None:
    model = linear_model(known_rank(M, N, 8, np.random.default_rng(0)))
    (tensor,) = model.graph.initializer
    (tmp_path / "w.bin").write_bytes(tensor.raw_data)
    onnx.external_data_helper.set_external_data(tensor, "w.bin")
    tensor.ClearField("raw_data")
    path = tmp_path / "in.onnx"
    path.write_bytes(model.SerializeToString())
    assert run(path).report.layers[0].rank == 8


@pytest.mark.parametrize("simplify", [False, True])
def test_the_layout_of_a_model_hubs_cache(simplify: bool, tmp_path: Path) -> None:
    """The model and its data are symbolic links into another folder, under other names."""
    real = save_external(tmp_path / "real")
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123" / "onnx"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, name in enumerate(("model.onnx", "model.onnx.data")):
        (real.parent / name).rename(blobs / f"{number}abc")
        (snapshot / name).symlink_to(Path("../../../blobs") / f"{number}abc")
    out = tmp_path / "out.onnx"
    options = {"check": True, "bench": True, "allow_slower": True, "samples": 1}
    result = run(snapshot / "model.onnx", simplify=simplify, **options)
    assert not any("not " in note and "simplified" in note for note in result.report.notes)
    assert result.report.latency
    result.save(out)
    np.testing.assert_allclose(outputs(out), reference(), rtol=1e-4, atol=1e-4)
    # What the links point to is input too.
    with pytest.raises(InputError, match="would overwrite"):
        result.save(blobs / "0abc", force=True)


def test_hard_linked_data(tmp_path: Path) -> None:
    path = save_external(tmp_path / "a")
    os.link(path.with_name("model.onnx.data"), tmp_path / "twin")
    compressed(path, tmp_path / "out.onnx")


def test_external_data_within_an_attribute(tmp_path: Path) -> None:
    weight = known_rank(M, N, 8, np.random.default_rng(0))
    constant = onnx.helper.make_node(
        "Constant", [], ["W"], value=onnx.numpy_helper.from_array(weight)
    )
    model = linear_model(weight)
    del model.graph.initializer[:]
    model.graph.node.insert(0, constant)
    path = tmp_path / "in.onnx"
    onnx.save(
        model, path, save_as_external_data=True, location="w.bin", size_threshold=0,
        convert_attribute=True,
    )  # fmt: skip
    external(onnx.load(path, load_external_data=False).graph.node[0].attribute[0].t)
    out = tmp_path / "out.onnx"
    run(path).save(out)
    x = uniform([3, M], np.random.default_rng(9))
    (result,) = ort.InferenceSession(str(out)).run(None, {"x": x})
    np.testing.assert_allclose(result, x @ weight, rtol=1e-4, atol=1e-3)


# Objects in memory


def test_a_proto_is_not_changed_and_gives_the_same_result(tmp_path: Path) -> None:
    model = three()
    before = model.SerializeToString()
    result = compress(model, rank=8, **FAST)  # type: ignore[arg-type]
    assert model.SerializeToString() == before
    assert result.report.input.path is None
    assert result.report.output.parameters == parameters(result.model) == 3 * 8 * 2 * M
    report = result.save(tmp_path / "out.onnx")
    assert report.output.path == str(tmp_path / "out.onnx")
    assert report.output.bytes == (tmp_path / "out.onnx").stat().st_size
    np.testing.assert_allclose(outputs(tmp_path / "out.onnx"), reference(), rtol=1e-4, atol=1e-4)


def test_an_ir_model_is_not_changed(tmp_path: Path) -> None:
    model = ir.load(save_external(tmp_path))
    before = ir.to_proto(model).SerializeToString()
    result = compress(model, rank=8, **FAST)  # type: ignore[arg-type]
    assert ir.to_proto(model).SerializeToString() == before
    assert [layer.rank for layer in result.report.layers] == [8, 8, 8]
    with pytest.raises(InputError, match="would overwrite"):
        result.save(tmp_path / "model.onnx.data", force=True)


def test_a_proto_without_its_data_is_refused(tmp_path: Path) -> None:
    model = onnx.load(save_external(tmp_path), load_external_data=False)
    with pytest.raises(InputError, match="pass its path instead"):
        compress(model, **FAST)  # type: ignore[arg-type]


# Saving


def test_saving_twice_and_elsewhere(tmp_path: Path) -> None:
    result = run(save_external(tmp_path / "in"))
    for number, mode in enumerate(("always", "never", "auto")):
        out = tmp_path / f"{number}.onnx"
        result.save(out, external_data=mode)  # type: ignore[arg-type]
        np.testing.assert_allclose(outputs(out), reference(), rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="exists"):
        result.save(out)
    # Over the file whose data the same result has been written to before.
    result.save(tmp_path / "0.onnx", external_data="always", force=True)
    np.testing.assert_allclose(outputs(tmp_path / "0.onnx"), reference(), rtol=1e-4, atol=1e-4)
    assert not list(tmp_path.rglob(".onnx-lowrank-*"))


def test_in_is_not_overwritten_by_save(tmp_path: Path) -> None:
    path = save_external(tmp_path)
    result = run(path)
    for name in ("model.onnx", "model.onnx.data"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(InputError, match="overwrite"):
            result.save(tmp_path / name, force=True)
        assert (tmp_path / name).read_bytes() == before


def test_dense_weights_in_external_data_are_carried_over(tmp_path: Path) -> None:
    path = save_external(tmp_path / "in")
    out = tmp_path / "out.onnx"
    run(path, exclude=["*"]).save(out, external_data="always")
    np.testing.assert_array_equal(outputs(out), outputs(path))
    data = out.with_name("out.onnx.data")
    assert data.stat().st_size >= 3 * 4 * M * M
    assert data.stat().st_size < 3 * 4 * M * M + 3 * 64 * 1024
    # The result outlives the file that it came from.
    path.with_name("model.onnx.data").unlink()
    outputs(out)


def test_too_large_for_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(save_external(tmp_path / "in"))
    monkeypatch.setattr("onnx_lowrank.graph.save.PROTOBUF_LIMIT", 1000)
    with pytest.raises(UsageError, match="external_data='never'"):
        result.save(tmp_path / "out.onnx", external_data="never")
    assert not (tmp_path / "out.onnx").exists()


def test_auto_puts_large_weights_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnx_lowrank.graph.save.AUTO", 1000)
    run(save_external(tmp_path / "in")).save(tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx.data").exists()
    np.testing.assert_allclose(outputs(tmp_path / "out.onnx"), reference(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_have_ordinary_permissions(umask: int, tmp_path: Path) -> None:
    result = run(save_external(tmp_path / "in"))
    old = os.umask(umask)
    try:
        result.save(tmp_path / "out.onnx", external_data="always")
    finally:
        os.umask(old)
    for name in ("out.onnx", "out.onnx.data"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask


# What is kept


@pytest.mark.parametrize(("opset", "ir_version"), [(7, 3), (7, 4), (9, 4), (13, 7), (17, 8)])
@pytest.mark.parametrize("simplify", [False, True])
def test_old_versions(opset: int, ir_version: int, simplify: bool, tmp_path: Path) -> None:
    """Before IR version 4 every initializer is an input too, which hides it from the pass."""
    weight = known_rank(M, N, 8, np.random.default_rng(0))
    model = linear_model(weight, opset=opset, ir_version=ir_version)
    if ir_version < 4:
        model.graph.input.append(
            onnx.helper.make_tensor_value_info("W", onnx.TensorProto.FLOAT, [M, N])
        )
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(model, path)
    run(path, simplify=simplify, constant_inputs=True).save(out)
    saved = onnx.load(out)
    assert [entry.version for entry in saved.opset_import] == [opset]
    assert [value.name for value in saved.graph.input] == ["x"]
    onnx.checker.check_model(saved, full_check=True)
    x = uniform([3, M], np.random.default_rng(9))
    (result,) = ort.InferenceSession(str(out)).run(None, {"x": x})
    np.testing.assert_allclose(result, x @ weight, rtol=1e-4, atol=1e-3)


def test_nodes_out_of_order_are_put_in_order(tmp_path: Path) -> None:
    """onnx asks for an order; ONNX Runtime does without, so such files are about."""
    model = three()
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(nodes[::-1])
    path = tmp_path / "in.onnx"
    path.write_bytes(model.SerializeToString())
    compressed(path, tmp_path / "out.onnx")
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)


def test_metadata_documentation_and_names_are_kept(tmp_path: Path) -> None:
    model = three()
    model.producer_name, model.producer_version, model.domain = "maker", "3", "a.b"
    model.model_version, model.doc_string = 7, "about the model"
    model.graph.doc_string = "about the graph"
    onnx.helper.set_model_props(model, {"author": "me", "license": "MIT"})
    for holder in (model.graph, model.graph.node[1], model.graph.input[0]):
        entry = holder.metadata_props.add()
        entry.key, entry.value = "key", "value"
    model.graph.node[1].name, model.graph.node[1].doc_string = "middle", "about the node"
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(model, path)
    run(path).save(out)
    saved = onnx.load(out)
    for field in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        assert getattr(saved, field) == getattr(model, field)
    assert saved.graph.name == "g"
    assert saved.graph.doc_string == "about the graph"
    kept = {p.key: p.value for p in unsigned(saved).metadata_props}
    assert kept == {"author": "me", "license": "MIT"}
    (node,) = [node for node in saved.graph.node if node.name == "middle"]
    assert node.output[0] == "b"
    assert node.doc_string == "about the node"
    for holder in (saved.graph, node, saved.graph.input[0]):
        assert ("key", "value") in [(p.key, p.value) for p in holder.metadata_props]
