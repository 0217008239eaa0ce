"""Train a network on MNIST and export it: python models/export_mnist.py NAME --out DIR."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mnist
import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn

__all__ = ["NETWORKS", "Network", "main"]


def mlp() -> nn.Module:
    """784-2048-2048-10 with ReLU and dropout."""
    return nn.Sequential(
        nn.Linear(784, 2048),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(2048, 2048),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(2048, 10),
    )


def cnn() -> nn.Module:
    """Two convolutions and a fully connected head 3136-1024-10."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 1024),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(1024, 10),
    )


class Block(nn.Module):
    """A transformer block with the normalisation before attention and before the MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (N, T, width) to tokens of the same shape."""
        tokens, width = x.shape[1], x.shape[2]
        qkv = self.qkv(self.norm_attention(x))
        qkv = qkv.reshape(-1, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv[0], qkv[1], qkv[2]  # (N, heads, T, width / heads)
        scores = query @ key.transpose(-2, -1) * (width // self.heads) ** -0.5
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(-1, tokens, width)
        x = x + self.projection(mixed)
        mapped: Tensor = self.mlp(self.norm_mlp(x))
        return x + mapped


class VisionTransformer(nn.Module):
    """Patches of 7×7 pixels, `depth` blocks, the mean token into a linear classifier."""

    def __init__(self, width: int = 128, heads: int = 4, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, stride=7)
        self.position = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Map images (N, 1, 28, 28) to logits (N, 10)."""
        tokens = self.patches(image).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.classifier(self.norm(self.blocks(tokens)).mean(1))
        return logits


@dataclass(frozen=True)
class Network:
    """What to train, and how to export it.

    Attributes:
        build: makes it, with random weights.
        shape: the shape of one image.
        dynamo: the dynamo exporter, or else the TorchScript one.
        opset: version of the operator set.
        epochs: passes over the training images.
        batch: images in one step.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    dynamo: bool
    opset: int
    epochs: int
    batch: int = 128


NETWORKS = {
    "mlp-torchscript": Network(mlp, (784,), dynamo=False, opset=17, epochs=7),
    "mlp-dynamo": Network(mlp, (784,), dynamo=True, opset=20, epochs=7),
    "cnn": Network(cnn, (1, 28, 28), dynamo=True, opset=20, epochs=5),
    "vit": Network(VisionTransformer, (1, 28, 28), dynamo=True, opset=20, epochs=8, batch=32),
}


def train(network: Network, digits: mnist.Digits) -> nn.Module:
    """Train with AdamW and a one-cycle learning rate; the seed is fixed.

    Every batch is moved by up to two pixels each way.
    """
    torch.manual_seed(0)
    # Steps this small lose more to waiting threads than they gain, above all on a busy machine.
    torch.set_num_threads(1)
    model = network.build()
    images = torch.from_numpy(digits.images.reshape(-1, 28, 28))
    labels = torch.from_numpy(digits.labels)
    batches = -(-len(images) // network.batch)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1e-3, total_steps=network.epochs * batches
    )
    for _ in range(network.epochs):
        for batch in torch.randperm(len(images)).chunk(batches):
            down, right = torch.randint(-2, 3, (2,)).tolist()
            moved = images[batch].roll((down, right), (1, 2)).reshape(-1, *network.shape)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(moved), labels[batch])
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    return model.eval()


def export(network: Network, model: nn.Module, path: Path) -> None:
    """Write the model with a dynamic batch, input ``image`` and output ``logits``."""
    image = torch.zeros(2, *network.shape)
    if network.dynamo:
        torch.onnx.export(
            model,
            (image,),
            path,
            input_names=["image"],
            output_names=["logits"],
            opset_version=network.opset,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    else:
        torch.onnx.export(
            model,
            (image,),
            path,
            input_names=["image"],
            output_names=["logits"],
            opset_version=network.opset,
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
            dynamo=False,
        )


def main() -> int:
    """Train, export, write the data, and print the accuracy of the exported model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=NETWORKS)
    parser.add_argument("--out", type=Path, required=True, help="directory to write into")
    parser.add_argument("--cache", type=Path, help="not used: nothing here is made of a model")
    options = parser.parse_args()
    network = NETWORKS[options.name]
    digits, held_out = mnist.load()
    model = train(network, digits)
    path = options.out / f"{options.name}.onnx"
    export(network, model, path)
    mnist.save_data(options.out, options.name, digits, held_out, network.shape)

    images = held_out.images.reshape(-1, *network.shape)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    logits = np.asarray(session.run(["logits"], {"image": images})[0])
    with torch.inference_mode():
        difference = np.abs(logits - model(torch.from_numpy(images)).numpy()).max()
    if difference > 1e-3:
        sys.exit(f"ONNX Runtime's logits are {difference:.2g} from torch's, expected at most 1e-3")
    accuracy = np.mean(logits.argmax(1) == held_out.labels)
    print(
        f"accuracy {accuracy:.3f} of {len(images)} held-out images; "
        f"ONNX Runtime's logits at most {difference:.1e} from torch's"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
