"""A model's nodes put into a function whose attributes its nodes take by reference."""

from __future__ import annotations

import onnx
import onnx.helper

__all__ = ["by_reference"]

_PLAIN = {
    onnx.AttributeProto.FLOAT,
    onnx.AttributeProto.INT,
    onnx.AttributeProto.STRING,
    onnx.AttributeProto.FLOATS,
    onnx.AttributeProto.INTS,
}


def by_reference(
    model: onnx.ModelProto, *, calls: int = 1, nested: bool = False
) -> onnx.ModelProto:
    """The same model as calls of one function, whose nodes have only attributes by reference.

    Args:
        model: a model whose nodes stand in the main graph; its initializers become Constant
            nodes in the function.
        calls: how many calls there are; each further one gives outputs that nothing reads.
        nested: put another function between, which passes the attributes on.
    """
    names: dict[str, onnx.AttributeProto] = {}
    nodes = []
    for number, old in enumerate(model.graph.node):
        node = onnx.NodeProto()
        node.CopyFrom(old)
        for attribute in node.attribute:
            if attribute.type in _PLAIN and old.op_type != "Constant":
                name = f"a{number}_{attribute.name}"
                value = onnx.AttributeProto()
                value.CopyFrom(attribute)
                value.name = name
                names[name] = value
                kind, own = attribute.type, attribute.name
                attribute.Clear()
                attribute.name, attribute.type, attribute.ref_attr_name = own, kind, name
        nodes.append(node)
    constants = [
        onnx.helper.make_node("Constant", [], [tensor.name], value=tensor)
        for tensor in model.graph.initializer
    ]
    inputs = [value.name for value in model.graph.input]
    outputs = [value.name for value in model.graph.output]
    opsets = list(model.opset_import)
    own = onnx.helper.make_opsetid("own", 1)
    function = onnx.helper.make_function(
        "own", "inner", inputs, outputs, [*constants, *nodes], opsets, attributes=list(names)
    )
    functions, called = [function], "inner"
    if nested:
        passed = onnx.helper.make_node("inner", inputs, outputs, domain="own")
        for name, value in names.items():
            attribute = passed.attribute.add()
            attribute.name, attribute.type, attribute.ref_attr_name = name, value.type, name
        functions.append(
            onnx.helper.make_function(
                "own", "outer", inputs, outputs, [passed], [*opsets, own], attributes=list(names)
            )
        )
        called = "outer"
    body = []
    for number in range(calls):
        results = outputs if not number else [f"{name}_{number}" for name in outputs]
        call = onnx.helper.make_node(called, inputs, results, name=f"call{number}", domain="own")
        call.attribute.extend(names.values())
        body.append(call)
    graph = onnx.helper.make_graph(body, "main", list(model.graph.input), list(model.graph.output))
    made = onnx.helper.make_model(
        graph, functions=functions, opset_imports=[*opsets, own], ir_version=model.ir_version
    )
    onnx.checker.check_model(made)
    return made
