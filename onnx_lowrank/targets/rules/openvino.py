"""OpenVINO: Intel's CPUs, GPUs and NPUs."""

from __future__ import annotations

from onnx_lowrank.targets.rules.base import Rules

__all__ = ["OpenVino"]


class OpenVino(Rules):
    """Took every node of every model that was tried; it says itself what it does not take."""

    name = "openvino"
    asked = False
    blocks = True

    def operators(self) -> None:
        """All of them."""
        return
