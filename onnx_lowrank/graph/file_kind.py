"""What a file is that is no ONNX model, and what makes an ONNX model of it."""

from __future__ import annotations

from pathlib import Path

__all__ = ["other_kind"]

_HEAD = 64
# How a file begins -> what it is and what helps.
_BEGINS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer; `git lfs pull` fetches the model itself"),
    (b"PK\x03\x04", "a zip archive, as torch.save and Keras write; export the model to ONNX, such "
     "as with torch.onnx.export or tf2onnx"),
    (b"\x80\x02", "a pickle, as torch.save wrote; export the model with torch.onnx.export"),
    (b"\x89HDF", "an HDF5 file, as Keras writes; export the model with tf2onnx"),
    (b"<!DOCTYPE", "a web page; the download has failed"),
    (b"<html", "a web page; the download has failed"),
)  # fmt: skip
# The same by what stands at the fifth byte, where flatbuffers have their mark.
_MARKS: dict[bytes, str] = {
    b"TFL3": "a TensorFlow Lite model; export the original model with tf2onnx",
    b"ORTM": "an ORT format model, which is ready to run and cannot be rewritten; give the .onnx "
    "file that it was made from",
}
_SUFFIXES: dict[str, str] = {
    ".safetensors": "weights without a graph; export the model with torch.onnx.export",
    ".gguf": "a GGUF file; export the original model to ONNX",
    ".pb": "a TensorFlow graph perhaps; export the model with tf2onnx",
    ".pt": "a PyTorch file; export the model with torch.onnx.export",
    ".pth": "a PyTorch file; export the model with torch.onnx.export",
}


def other_kind(path: Path) -> str | None:
    """What a file is, by its first bytes and then its name, as the end of a sentence.

    Args:
        path: a file that exists.

    Returns:
        Such as "a Git LFS pointer; …"; None where it is not known.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    for begin, kind in _BEGINS:
        if head.startswith(begin):
            return kind
    return _MARKS.get(head[4:8]) or _SUFFIXES.get(path.suffix.lower())
