"""Runs onnxsim on a file, in a process of its own: ``python _onnxsim_worker.py IN OUT [SKIP…]``.

A process of its own, because onnxsim takes hundreds of MB to import, prints to the standard
streams, and can bring the whole process down with it.  Run by its path, so that it imports
nothing else of this package.
"""

from __future__ import annotations

import sys

import onnx


def main(source: str, target: str, *skipped: str) -> None:
    """Simplify ``source`` into ``target`` without these optimizers of onnxsim."""
    # onnxsim imports torch where it is installed, for a part that is not used here.  That would
    # be two thirds of the time that onnxsim takes to start.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    import onnxsim

    simplified, _ = onnxsim.simplify(
        source,
        skipped_optimizers=list(skipped),
        # Constants above this are not folded into larger ones.
        tensor_size_threshold="1KB",
    )
    onnx.save(simplified, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
