"""Execution providers: the one list of what a session can be opened on in this process."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnxruntime as ort

from onnx_lowrank.errors import InputError, named
from onnx_lowrank.runtime.plugins import (
    PLUGINS,
    Plugin,
    device_of,
    registered_plugins,
)

__all__ = ["CPU", "Provider", "built_in", "provider_of", "resolve_provider", "short_name"]

_SUFFIX = "ExecutionProvider"
# Sends a model to a service; what it is given locally runs on the CPU.
_NO_PROVIDERS = frozenset({"AzureExecutionProvider"})
_ARM = ("aarch64", "arm64")
_COMPUTE_HALF = frozenset({"coreml", "cuda", "dml", "nnapi", "qnn", "rocm", "tensorrt"})


@dataclass(frozen=True, eq=False)
class Provider:
    """An execution provider of this process.

    Attributes:
        name: as the user writes it.
        full: as ONNX Runtime calls it.
        title: how messages call it.
        emulated: whether its times mean nothing.
        half: whether it computes float16 models in float16.
        options: provider options.
        device: the device of a plugin; None for a built-in provider.
    """

    name: str
    full: str
    title: str
    emulated: bool = False
    half: bool = False
    options: Mapping[str, str] = field(default_factory=dict)
    device: Any = None

    @property
    def names(self) -> tuple[str, str]:
        """The one that the user writes, and ONNX Runtime's."""
        return self.name, self.full


CPU = Provider(
    "cpu", "CPUExecutionProvider", "CPU", half=platform.machine().lower() in _ARM
)  # x86 upcasts float16


def short_name(full: str) -> str:
    """``OpenVINOExecutionProvider`` -> ``openvino``."""
    return full.removesuffix(_SUFFIX).lower()


def built_in() -> dict[str, str]:
    """Short name -> full name of what is compiled into the installed ONNX Runtime."""
    # A plugin stands in the list too once it is registered, but without its device; OpenVINO also
    # as "OpenVINOExecutionProvider.AUTO".
    others = {*_NO_PROVIDERS, *registered_plugins()}
    available = (str(full) for full in ort.get_available_providers())
    return {short_name(full): full for full in available if full.partition(".")[0] not in others}


def resolve_provider(name: str) -> Provider:
    """The provider of a name such as ``cpu``, ``openvino`` or ``CPUExecutionProvider``.

    Raises:
        InputError: it is not installed, offers no device, or there is no such provider.
    """
    found = provider_of(name)
    if found is not None:
        return found
    known = {**{plugin.name: None for plugin in PLUGINS.values()}, **built_in()}
    raise InputError(
        f"{named('ep', name)}: this ONNX Runtime ({ort.__version__}) has no such execution "
        "provider; "
        f"expected one of {', '.join(sorted(known))}"
    )


def provider_of(name: str) -> Provider | None:
    """As `resolve_provider`, but None where the name is of no provider that is known here.

    Raises:
        InputError: it is a plugin that is not installed or offers no device.
    """
    wanted = name.strip().lower()
    for short, full in built_in().items():
        if wanted in (short, full.lower()):
            if short == CPU.name:
                return CPU
            title = full.removesuffix(_SUFFIX)
            return Provider(short, full, title, half=short in _COMPUTE_HALF)
    for plugin in PLUGINS.values():
        if wanted in (plugin.name, plugin.provider.lower()):
            return _of_plugin(plugin)
    return None


def _of_plugin(plugin: Plugin) -> Provider:
    device = device_of(plugin)
    return Provider(
        plugin.name,
        plugin.provider,
        plugin.title,
        emulated=plugin.emulated,
        half=plugin.name in _COMPUTE_HALF,
        options=plugin.all_options,
        device=device,
    )
