from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_lowrank.graph.layout import Layout


def _factorization(draw: st.DrawFn, size: int) -> tuple[int, ...]:
    """A shape of this size, with axes of length 1 among them."""
    shape = []
    while size > 1:
        divisor = draw(st.sampled_from([d for d in range(2, size + 1) if size % d == 0]))
        shape.append(divisor)
        size //= divisor
    for _ in range(draw(st.integers(0, 2))):
        shape.insert(draw(st.integers(0, len(shape))), 1)
    return tuple(shape)


@st.composite
def layouts(draw: st.DrawFn, base: tuple[int, ...] | None = None) -> Layout:
    if base is None:
        base = _factorization(draw, draw(st.sampled_from([1, 4, 6, 8, 12, 16])))
    layout = Layout.of(base)
    for _ in range(draw(st.integers(0, 5))):
        if draw(st.booleans()):
            layout = layout.transpose(*draw(st.permutations(range(len(layout.shape)))))
        else:
            layout = layout.reshape(*_factorization(draw, math.prod(layout.shape)))
    return layout


@st.composite
def chains(draw: st.DrawFn) -> tuple[Layout, Layout]:
    """A layout, and one that begins with its shape."""
    first = draw(layouts())
    return first, draw(layouts(first.shape))


@st.composite
def siblings(draw: st.DrawFn) -> tuple[Layout, Layout]:
    """Two layouts of one array."""
    first = draw(layouts())
    return first, draw(layouts(first.base))


def numbered(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(math.prod(shape)).reshape(shape)


def copies(layout: Layout) -> bool:
    """Whether a reshape on the way has to copy."""
    array = numbered(layout.base)
    return not np.shares_memory(array, layout.apply(array))


@given(layouts())
def test_steps_are_those_of_numpy(layout: Layout) -> None:
    expected = numbered(layout.base)
    for step in layout.steps:
        if step.kind == "transpose":
            expected = np.transpose(expected, step.argument)
        else:
            expected = np.reshape(expected, step.argument)
    array = layout.apply(numbered(layout.base))
    assert array.shape == layout.shape
    np.testing.assert_array_equal(array, expected)


@given(layouts())
def test_inverse_leads_back(layout: Layout) -> None:
    array = numbered(layout.base)
    back = layout.inverse()
    assert back.base == layout.shape
    np.testing.assert_array_equal(back.apply(layout.apply(array)), array)


@given(chains())
def test_then_is_one_after_the_other_in_no_more_steps(chain: tuple[Layout, Layout]) -> None:
    first, second = chain
    both = first.then(second)
    array = numbered(first.base)
    np.testing.assert_array_equal(both.apply(array), second.apply(first.apply(array)))
    assert len(both.steps) <= len(first.steps) + len(second.steps)


@given(siblings())
def test_equal_keys_read_the_same_and_the_same_reading_has_one_key(
    pair: tuple[Layout, Layout],
) -> None:
    one, other = pair
    array = numbered(one.base)
    same = np.array_equal(one.apply(array), other.apply(array)) and one.shape == other.shape
    if one.key == other.key:
        assert same
    elif same:  # only a reading that cannot be a view may have several keys
        assert copies(one) or copies(other)


@given(layouts())
def test_a_way_and_back_has_the_key_of_no_step(layout: Layout) -> None:
    round_trip = layout.then(layout.inverse())
    if not copies(round_trip):
        assert round_trip.key == Layout.of(layout.base).key


def test_neighbouring_steps_merge() -> None:
    turned = Layout.of((2, 3)).transpose(1, 0)
    assert turned.then(Layout.of((3, 2)).transpose(1, 0)).steps == ()
    flat = Layout.of((2, 3)).reshape(6)
    assert len(flat.then(Layout.of((6,)).reshape(3, 2)).steps) == 1
    assert flat.then(Layout.of((6,)).reshape(2, 3)).steps == ()


def test_steps_that_do_nothing_leave_no_trace() -> None:
    layout = Layout.of((4, 5))
    assert layout.transpose(0, 1) is layout
    assert layout.reshape(4, 5) is layout


def test_two_ways_to_one_reading_have_one_key() -> None:
    transposed = Layout.of((4, 5)).transpose(1, 0)
    roundabout = Layout.of((4, 5)).reshape(1, 4, 5).transpose(2, 0, 1).reshape(5, 4)
    assert transposed.key == roundabout.key
    assert transposed.key != Layout.of((4, 5)).reshape(5, 4).key


def test_square_matrix_and_its_transpose_differ() -> None:
    square = Layout.of((4, 4))
    assert square.key != square.transpose(1, 0).key


def test_large_layout_has_a_key_without_memory_of_that_size() -> None:
    shape = (1 << 20, 1 << 20)  # 1 TB of bytes
    assert Layout.of(shape).transpose(1, 0).transpose(1, 0).key == Layout.of(shape).key


def test_empty_arrays_are_read_too() -> None:
    layout = Layout.of((0, 3)).transpose(1, 0).reshape(1, 3, 0)
    assert layout.apply(np.empty((0, 3))).shape == (1, 3, 0)
    assert layout.key == layout.key


@pytest.mark.parametrize("perm", [(0,), (0, 0), (0, 2), (0, 1, 2), (-1, 0)])
def test_wrong_permutation(perm: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="no permutation"):
        Layout.of((4, 5)).transpose(*perm)


def test_wrong_size() -> None:
    with pytest.raises(ValueError, match=r"\(4, 5\) cannot be reshaped to \(3, 7\)"):
        Layout.of((4, 5)).reshape(3, 7)


@given(layouts())
def test_shortest_is_the_same_reading(layout: Layout) -> None:
    short = layout.shortest()
    array = numbered(layout.base)
    np.testing.assert_array_equal(short.apply(array), layout.apply(array))
    assert len(short.steps) <= len(layout.steps)


def test_a_transpose_between_reshapes_is_a_transpose() -> None:
    roundabout = Layout.of((4, 5)).reshape(1, 4, 5).transpose(0, 2, 1).reshape(5, 4)
    assert roundabout.shortest() == Layout.of((4, 5)).transpose(1, 0)
    wider = Layout.of((4, 5)).reshape(1, 4, 5).transpose(0, 2, 1).reshape(5, 2, 2)
    assert [step.kind for step in wider.shortest().steps] == ["transpose", "reshape"]
