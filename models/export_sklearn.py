"""Train scikit-learn's MLP on MNIST, export it: python models/export_sklearn.py NAME --out DIR."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import mnist
import numpy as np
import onnxruntime as ort
from skl2onnx import to_onnx
from skl2onnx.common.data_types import FloatTensorType
from sklearn.neural_network import MLPClassifier

__all__ = ["main"]

OPSET = 21


def main() -> int:
    """Train, export, write the data, and print the accuracy of the exported model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["mlp-sklearn"])
    parser.add_argument("--out", type=Path, required=True, help="directory to write into")
    parser.add_argument("--cache", type=Path, help="not used: nothing here is made of a model")
    options = parser.parse_args()
    digits, held_out = mnist.load()
    classifier = MLPClassifier((1024, 512), max_iter=8, tol=0, random_state=0)
    classifier.fit(digits.images, digits.labels)
    model = to_onnx(
        classifier,
        initial_types=[("image", FloatTensorType([None, 784]))],
        target_opset=OPSET,
        options={"zipmap": False},  # probabilities as one tensor, not as a list of dictionaries
    )
    model.graph.name = options.name  # skl2onnx's own is random
    path = options.out / f"{options.name}.onnx"
    path.write_bytes(model.SerializeToString())

    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    labels, probabilities = session.run(None, {"image": held_out.images})
    difference = np.abs(probabilities - classifier.predict_proba(held_out.images)).max()
    if difference > 1e-3:
        sys.exit(f"ONNX Runtime's probabilities are {difference:.2g} off, expected at most 1e-3")
    mnist.save_data(options.out, options.name, digits, held_out, (784,))
    print(
        f"accuracy {np.mean(labels == held_out.labels):.3f} of {len(labels)} held-out images; "
        f"ONNX Runtime's probabilities at most {difference:.1e} from scikit-learn's"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
