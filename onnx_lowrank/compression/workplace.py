"""Workplace: who does the work of a run, and where finished pieces of it are kept."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from onnx_lowrank.compression.origin import versions
from onnx_lowrank.compression.settings import Settings
from onnx_lowrank.data.sources import source_files
from onnx_lowrank.errors import InputError, named
from onnx_lowrank.files import Output, digest
from onnx_lowrank.fitting.descent import DescentPlace, DescentState
from onnx_lowrank.fitting.gather import GatheringState
from onnx_lowrank.fitting.heal import Healed
from onnx_lowrank.fitting.statistics_file import SavedFisher
from onnx_lowrank.graph.fingerprint import fingerprint
from onnx_lowrank.graph.load import LoadedModel
from onnx_lowrank.maps.choice import Spectrum
from onnx_lowrank.maps.pair import Errors, Factors
from onnx_lowrank.numerics.adam import AdamState
from onnx_lowrank.numerics.components import Basis
from onnx_lowrank.numerics.crew import Crew
from onnx_lowrank.numerics.engine import engine_of
from onnx_lowrank.numerics.fisher import Fisher
from onnx_lowrank.numerics.moments import Moments, Sums
from onnx_lowrank.numerics.units import Units
from onnx_lowrank.runtime.cluster import working
from onnx_lowrank.runtime.pieces import Pieces, opened
from onnx_lowrank.schema.json_report import tool_name

__all__ = ["workplace"]

_CLASSES: tuple[type, ...] = (
    *(Moments, Sums, GatheringState, Fisher, SavedFisher),
    *(Spectrum, Basis, Units, Factors, Errors),
    *(AdamState, DescentPlace, DescentState, Healed),
)
"""What pieces of work are made of."""
# How a run is done, and where things are: not what comes out.
_PASSING = {"work", "executor", "memory", "time_limit", "dry_run"}
_PLACES = {"save_stats", "save_costs", "save_recipe"}


@contextlib.contextmanager
def workplace(
    settings: Settings, source: LoadedModel, outputs: Sequence[Output]
) -> Iterator[tuple[Crew, Pieces | None]]:
    """The crew of a run, and its finished work; None where none is kept.

    Args:
        settings: the options.
        source: the model.
        outputs: everything that the run writes, none of which may be in the folder of the work.

    Raises:
        InputError: there is no such cluster or device, or the folder is not ours or in use.
    """
    engine_of(settings.device)  # before the work: it may not be there
    with contextlib.ExitStack() as stack:
        pieces = None
        if settings.work is not None:
            folder = Path(settings.work)
            for output in outputs:
                if os.path.realpath(output.path.parent) == os.path.realpath(folder):
                    raise InputError(
                        f"{named('work', folder)}: expected a folder of its own, got the one of "
                        f"{output}"
                    )
            begun = _begun(settings, source)
            pieces = stack.enter_context(opened(folder, begun, _program(), _CLASSES))
        crew = stack.enter_context(
            working(settings.executor, Crew(keeper=pieces, device=settings.device))
        )
        yield crew, pieces


def _begun(settings: Settings, source: LoadedModel) -> dict[str, Any]:
    """What is worked on, as plain values; of what is in memory only that it is."""
    known = source.described.digest
    samples = {}
    for name in ("data", "calibration", "labels", "load_stats"):
        given = getattr(settings, name)
        files = () if given is None else source_files(given)
        if files:
            samples[name] = digest(files)
    options = settings.to_dict()
    for name in (*_PASSING, *_PLACES, *samples):
        options.pop(name, None)
    return {
        "model": fingerprint(source.model) if known is None else known,
        "samples": samples,
        "settings": options,
    }


def _program() -> dict[str, str]:
    """Versions of all that computes, and the digest of this package's own text."""
    text = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        text.update(path.read_bytes())
    return {"tool": tool_name(), "text": text.hexdigest(), **versions()}
