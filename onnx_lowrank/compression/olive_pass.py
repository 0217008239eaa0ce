"""A pass for Olive (extra ``[olive]``), thin over `onnx_lowrank.compress`.

Olive finds passes by a package configuration.  This writes one that has Olive's own passes, as the
Olive that is installed lists them, and this one:

    python -m onnx_lowrank.compression.olive_pass olive-package.json
    olive run --config run.json --package-config olive-package.json
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import onnx
from olive.hardware.accelerator import AcceleratorSpec
from olive.model import ONNXModelHandler
from olive.model.utils import resolve_onnx_path
from olive.package_config import OlivePackageConfig
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam
from olive.search.search_parameter import Categorical

from onnx_lowrank.compression.api import compress
from onnx_lowrank.compression.option import Kind, Option
from onnx_lowrank.compression.options import OPTIONS
from onnx_lowrank.compression.verbs import SETTINGS
from onnx_lowrank.errors import InputError
from onnx_lowrank.files import Output, write_text
from onnx_lowrank.graph.serialize import data_locations

__all__ = ["OnnxLowRank", "package_config"]

_LOG = logging.getLogger(__name__)
_NAME = "OnnxLowRank"
# What a search tries, unless the run's configuration says otherwise.
_SEARCHED = {"keep": (0.9, 0.8, 0.7, 0.6, 0.5)}
# Types of a value in JSON; all others are texts.
_TYPES: dict[Kind, Any] = {
    "switch": bool,
    "off": bool,
    "number": float,
    "whole": int,
    "wholes": list[int],
    "texts": list[str],
    "paths": list[str],
    "list": list[str],
    "numbers": list[float],
    "size": int | str,
    "time": float | str,
    "multiple": int | str,
    "shapes": dict[str, list[int]],
    "dims": dict[str, int],
}


class OnnxLowRank(Pass):
    """Replace constant linear maps by pairs of low rank, in any of the number formats."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:  # noqa: ARG003
        own = {option.name: _parameter(option) for option in SETTINGS}
        external = OPTIONS["external_data"]
        return {**own, external.name: _parameter(external)}

    def _run_for_config(
        self, model: ONNXModelHandler, config: type[BasePassConfig], output_model_path: str
    ) -> ONNXModelHandler:
        given = {name: value for name, value in config.model_dump().items() if value is not None}
        external = given.pop("external_data", "auto")
        known = {option.name for option in SETTINGS}
        options = {name: value for name, value in given.items() if name in known}
        result = compress(model.model_path, **options)
        path = Path(resolve_onnx_path(output_model_path))
        report = result.save(path, external_data=external, force=True)
        _LOG.info(report.summary)
        for note in report.notes:
            _LOG.info("note: %s", note)
        if data_locations(onnx.load(path, load_external_data=False)):
            return ONNXModelHandler(model_path=str(path.parent), onnx_file_name=path.name)
        return ONNXModelHandler(model_path=str(path))


def _parameter(option: Option) -> PassConfigParam:
    """An option as Olive describes one."""
    plain = option.help.format_map(_Spelled())
    support = _SEARCHED.get(option.name)
    return PassConfigParam(
        type_=_TYPES.get(option.kind, str),
        default_value=None,  # as `compress` has it
        search_defaults=None if support is None else Categorical(list(support)),
        description=plain,
    )


class _Spelled(dict[str, str]):
    """Names of options in a help text, as the configuration has them."""

    def __missing__(self, name: str) -> str:
        return name


def package_config() -> dict[str, Any]:
    """The passes of the Olive that is installed, and this one."""
    config: dict[str, Any] = json.loads(
        Path(OlivePackageConfig.get_default_config_path()).read_text(encoding="utf-8")
    )
    config["passes"][_NAME] = {
        "module_path": f"onnx_lowrank.compression.olive_pass.{_NAME}",
        "supported_providers": ["*"],
        "supported_accelerators": ["*"],
        "supported_precisions": ["*"],
        "supported_algorithms": [],
        "supported_quantization_encodings": [],
    }
    return config


def main(arguments: list[str]) -> int:
    """Write the package configuration; returns the exit code."""
    if len(arguments) != 1:
        print("expected one file to write, such as olive-package.json", file=sys.stderr)
        return 2
    try:
        write_text(Output(Path(arguments[0])), json.dumps(package_config(), indent=2))
    except InputError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
