"""The tests; a folder for each package, and helpers."""

import os

# Before ONNX Runtime is imported: the tests send nothing, and no warning of a home folder that
# cannot be written gets into what they compare.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
