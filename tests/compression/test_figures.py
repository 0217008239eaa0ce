"""What a report shows of a layer's spectrum, bytes and scope."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnx_lowrank.compression.figures import shown_spectrum
from onnx_lowrank.maps.choice import Spectrum
from tests.helpers.commands import weight
from tests.helpers.models import factored, linear_model


def test_a_spectrum_is_thinned_and_keeps_the_chosen_rank() -> None:
    squares = np.arange(1000, 0, -1.0) ** 2
    shown = shown_spectrum(Spectrum(squares, True), (1000, 1500), 333)
    assert shown is not None
    assert len(shown.ranks) <= 64
    assert (shown.ranks[0], shown.ranks[-1], shown.full) == (1, 1000, 1000)
    assert 333 in shown.ranks
    at = shown.ranks.index(333)
    assert shown.values[at] == pytest.approx(668 / 1000, rel=1e-3)
    assert shown.energy[at] == pytest.approx(squares[:333].sum() / squares.sum(), rel=1e-5)
    assert shown.energy[-1] == 1.0
    assert shown.break_even == pytest.approx(600.0)


def test_leading_components_end_where_they_are_known() -> None:
    shown = shown_spectrum(Spectrum(np.array([4.0, 1.0]), True, "weight", 5.0), (64, 64))
    assert shown is not None
    assert shown.ranks == (1, 2)
    assert shown.full == 64
    assert shown.energy == (0.4, 0.5)


@pytest.mark.parametrize(
    "found",
    [
        Spectrum(None, True),
        Spectrum(np.array([np.nan]), False),
        Spectrum(np.zeros(3), True),
        Spectrum(np.zeros(0), True),
    ],
)
def test_nothing_is_shown_of_what_is_not_known(found: Spectrum) -> None:
    assert shown_spectrum(found, (3, 3)) is None


def test_bytes_and_scope_of_a_layer() -> None:
    model = linear_model(weight())
    scopes = "['', 'encoder', 'encoder.fc', 'linear_3']"
    model.graph.node[0].metadata_props.append(
        onnx.StringStringEntryProto(key="pkg.torch.onnx.name_scopes", value=scopes)
    )
    (layer,) = factored(model, energy=0.99).report.layers
    assert layer.scope == "encoder.fc"
    assert layer.bytes_before == 4 * layer.parameters_before
    assert layer.bytes_after == 4 * layer.parameters_after
    assert layer.spectrum is not None
    assert layer.spectrum.full == 64
    assert layer.ms_before is None, "layers were not timed"
