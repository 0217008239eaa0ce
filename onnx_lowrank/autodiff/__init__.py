"""The gradient of an ONNX graph, written as another ONNX graph."""
