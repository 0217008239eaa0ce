"""ONNX Runtime: sessions, providers, plugins, its log, timing, and values inside a model."""
