"""Places: every file that a run reads, and every file that it writes beside the result."""

from __future__ import annotations

from pathlib import Path

from onnx_lowrank.compression.settings import Settings
from onnx_lowrank.data.sources import code_files, source_files
from onnx_lowrank.files import Output
from onnx_lowrank.graph.load import LoadedModel
from onnx_lowrank.ranks.recipe import Recipe

__all__ = ["read_files", "side_outputs"]


def read_files(source: LoadedModel, settings: Settings) -> tuple[Path, ...]:
    """The files of the model, the samples, the labels, the user's code and what is loaded.

    Args:
        source: the model.
        settings: the options.
    """
    named = (settings.data, settings.calibration)
    given = settings.recipe
    recipe = given.path if isinstance(given, Recipe) else given
    plain = (settings.labels, settings.load_stats, settings.load_costs, recipe)
    return (
        *source.files,
        *(file for item in named if item is not None for file in source_files(item)),
        *code_files(settings.metric),
        *(Path(path) for path in plain if path is not None),
        *(Path(path) for path in settings.custom_ops),
    )


def side_outputs(settings: Settings) -> tuple[Output, ...]:
    """Statistics, costs and the recipe, which replace what an earlier run wrote."""
    saved = (
        ("save_stats", settings.save_stats),
        ("save_costs", settings.save_costs),
        ("save_recipe", settings.save_recipe),
    )
    return tuple(Output(Path(path), option) for option, path in saved if path is not None)
