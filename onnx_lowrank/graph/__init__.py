"""The ONNX model as a graph: load, walk, constants, simplify, shape for a target, save."""
