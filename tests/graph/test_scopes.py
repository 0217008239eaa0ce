"""The modules around a node."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from onnx_lowrank.graph.scopes import module_of, scopes_of


@pytest.mark.parametrize(
    ("written", "scopes", "module"),
    [
        (None, (), None),
        ("", (), None),
        ("['', 'linear']", ("linear",), None),
        ("['', 'blocks', 'blocks.0', 'blocks.0.qkv', 'linear']",
         ("blocks", "blocks.0", "blocks.0.qkv", "linear"), "blocks.0.qkv"),
        ("['', 'encoder', 'encoder.fc']", ("encoder", "encoder.fc"), "encoder.fc"),
        ("not a list", ("not a list",), None),
        ("3", ("3",), None),
    ],
)  # fmt: skip
def test_what_the_exporter_wrote(
    written: str | None, scopes: tuple[str, ...], module: str | None
) -> None:
    node = ir.Node("", "MatMul", [])
    if written is not None:
        node.metadata_props["pkg.torch.onnx.name_scopes"] = written
    assert scopes_of(node) == scopes
    assert module_of(node) == module
