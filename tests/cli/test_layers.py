"""The table of the layers on terminals of 80 and 60 columns, and in a pipe."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import pytest

from onnx_lowrank.cli.layers import labels, print_layers
from onnx_lowrank.cli.screen import Screen
from onnx_lowrank.schema.layer import Layer
from tests.helpers.screens import shown

PARTS = ("attention.self.query", "attention.self.key", "attention.output.dense")
REASON = (
    "energy 0.95 needs rank 301, 1.57 of break-even (192.0); 172 is the largest that saves 10 %"
)


def reason(number: int) -> str:
    """Each layer has numbers of its own."""
    return REASON.replace("301", str(301 + number))


def layer(number: int, *, dense: bool = False, name: str | None = None) -> Layer:
    place = f"bert.encoder.layer.{number // 3}.{PARTS[number % 3]}"
    size = 384 * (384 + 8 * number)
    return Layer(
        name=name or f"/{place.replace('.', '/')}/MatMul",
        op_type="MatMul",
        form="matmul-right",
        weight=f"onnx::MatMul_{number}",
        shape=(384, 384 + 8 * number),
        slices=1,
        status="dense" if dense else "factored",
        rank=None if dense else 64,
        reason=reason(number) if dense else "rank 64 was given",
        parameters_before=size,
        parameters_after=size if dense else size // 2,
        energy=None if dense else 0.98765,
        energy_of="output",
        output_error=None if dense else 0.1 + number / 1000,
        scope=place,
    )


def layers(count: int) -> list[Layer]:
    return [layer(number, dense=number % 5 == 0) for number in range(count)]


def table(rows: list[Layer]) -> Callable[[Screen], object]:
    return lambda screen: print_layers(rows, screen)


@pytest.mark.parametrize("width", [80, 60])
def test_one_row_a_layer(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = layers(18)
    lines = shown(table(rows), width, monkeypatch)
    assert max(map(len, lines)) <= width
    assert len(lines) <= 18 + 5
    own = [line for line in lines if re.search(r"\d+×\d+", line)]
    assert len(own) == 18
    assert len({line.split()[0] for line in own}) == 18  # names that differ still
    for line, row in zip(own, rows, strict=True):
        if row.rank is None:
            assert "dense: energy 0.95" in line
        else:
            assert line.endswith(f"{row.output_error:.3g}")


@pytest.mark.parametrize("width", [80, 60])
def test_many_layers_are_summed_up(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = layers(165)
    lines = shown(table(rows), width, monkeypatch)
    assert max(map(len, lines)) <= width
    assert len(lines) <= 30
    text = " ".join(line.strip() for line in lines)
    assert text.startswith("165 linear maps, 132 factored")
    assert "145 more with 8" in text
    assert "116 factored, 29 dense, errors up to 0.244" in text
    assert "--all-rows shows them" in text
    largest = {f"384×{384 + 8 * number}" for number in range(145, 165)}
    assert {size for size in largest if size in text} == largest
    every = shown(table(rows), width, monkeypatch, every=True)
    assert sum("384×" in line for line in every) == 165


def test_a_pipe_has_every_name_and_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = layers(165)
    lines = shown(table(rows), None, monkeypatch)
    assert len(lines) == 167
    for line, row in zip(lines[2:], rows, strict=True):
        assert line.startswith(f"{row.name} ")
        assert f" {row.scope} " in line
        if row.rank is None:
            assert line.endswith(f"dense: {row.reason}")


def of_integers(count: int) -> list[Layer]:
    """Layers whose weights are named in the reason."""
    advice = "factor the float model first, then quantize"
    return [
        dataclasses.replace(
            row, form="quantized", reason=f"{row.weight} is quantized (MatMulInteger); {advice}"
        )
        for row in (layer(number, dense=True) for number in range(count))
    ]


@pytest.mark.parametrize("width", [80, None])
def test_many_that_are_left_because_of_their_weights_have_one_line(
    width: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*of_integers(36), layer(36), layer(37, dense=True)]
    lines = shown(table(rows), width, monkeypatch)
    assert lines[0].startswith("38 linear maps, 1 factored")
    assert sum("384×" in line for line in lines) == 2
    text = " ".join(line.strip() for line in lines)
    assert text.count("quantized (MatMulInteger)") == 1
    assert (
        "36 more left dense (quantized): each weight is quantized (MatMulInteger); factor the "
        "float model first, then quantize; --all-rows shows them"
    ) in text
    every = shown(table(rows), width, monkeypatch, every=True)
    assert sum("384×" in line for line in every) == 38
    assert not any("more left dense" in line for line in every)
    # A few have rows, and what is left alone has no table.
    assert sum("384×" in line for line in shown(table(of_integers(4)), width, monkeypatch)) == 4
    alone = shown(table(of_integers(5)), width, monkeypatch)
    assert alone[0] == "5 linear maps, 0 factored"
    assert alone[1].startswith("5 more left dense (quantized)")


def test_weights_of_forms_that_are_off_are_told_of_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [dataclasses.replace(row, form="conv", off=True) for row in of_integers(4)]
    rows[3] = dataclasses.replace(rows[3], form="gather")
    lines = shown(table(rows), None, monkeypatch)
    said = "is quantized (MatMulInteger); factor the float model first, then quantize"
    assert lines == [
        "0 linear maps, 0 factored",
        f"3 more left dense (conv): each weight {said}",
        f"1 more left dense (gather): onnx::MatMul_3 {said}",
    ]


def test_one_reason_of_many_layers_is_one_line_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a pipe layers that had a choice have rows: someone may look for their names."""
    same = "a pair here has more damage for what it saves than elsewhere"
    rows = [
        dataclasses.replace(row, reason=same) if row.rank is None else row for row in layers(100)
    ]
    lines = shown(table(rows), 80, monkeypatch)
    text = " ".join(line.strip() for line in lines)
    assert text.startswith("100 linear maps, 80 factored")
    assert "60 more with " in text
    assert "60 factored, 0 dense" in text
    assert f"20 more left dense (matmul-right): {same}; --all-rows shows them" in text
    assert text.count(same) == 1
    assert sum(same in line for line in shown(table(rows), None, monkeypatch)) == 20
    # Integers are in the table: each has a format and an error of its own.
    stored = [dataclasses.replace(row, format="8 bits") for row in rows if row.rank is None]
    assert "more left dense" not in " ".join(shown(table(stored), 80, monkeypatch))


def test_a_module_stands_for_a_name_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["node_MatMul_92", "MatMul_3", "/encoder/fc/MatMul", "head"]
    rows = [layer(number, name=name) for number, name in enumerate(names)]
    scopes = [row.scope for row in rows]
    assert list(labels(rows).values()) == [scopes[0], scopes[1], *names[2:]]
    # Two in one module keep their names.
    both = [dataclasses.replace(row, scope="encoder") for row in rows[:2]]
    assert list(labels(both).values()) == names[:2]
    lines = shown(table(rows), 100, monkeypatch)
    assert lines[2].startswith("bert.encoder.layer.0.attention.self.query ")
    assert shown(table(rows), None, monkeypatch)[2].startswith("node_MatMul_92 ")


@pytest.mark.parametrize("width", [80, 60])
def test_a_number_format_has_a_column(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [dataclasses.replace(row, format="4 bits, blocks of 32") for row in layers(4)]
    lines = shown(table(rows), width, monkeypatch)
    assert "format" in lines[1]
    assert sum(" 4 bits/32 " in line for line in lines) == 4
    assert max(map(len, lines)) <= width
    piped = shown(table(rows), None, monkeypatch)
    assert sum(" 4 bits, blocks of 32 " in line for line in piped) == 4
    assert "format" not in shown(table(layers(4)), width, monkeypatch)[1]


def test_a_reason_does_not_repeat_the_column_of_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    form = "8 bits, blocks of 32"
    reason = f"dense: off; --ops conv turns it on; weights in {form}"
    dense = dataclasses.replace(layers(1)[0], rank=None, status="dense", format=form, reason=reason)
    row = shown(table([dense]), 200, monkeypatch)[2]
    assert row.endswith("dense: off; --ops conv turns it on")
    assert row.count("8 bits") == 1
    chosen = dataclasses.replace(dense, reason=f"weights in {form}, predicted damage 1e-05")
    row = shown(table([chosen]), 200, monkeypatch)[2]
    assert row.endswith("dense: predicted damage 1e-05")
    assert row.count("8 bits") == 1


def test_reasons_that_are_cut_are_whole_below(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(table(layers(3)), 80, monkeypatch)
    assert REASON in " ".join(line.strip() for line in lines)
    several = [
        dataclasses.replace(layer(number, dense=True), reason=f"{REASON} {number}")
        for number in range(5)
    ]
    assert shown(table(several), 80, monkeypatch)[-1].startswith("reasons are cut here")
