"""Samples from files and folders."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from onnx import numpy_helper

from onnx_lowrank.data.declared import InputSpec
from onnx_lowrank.data.loading import load_samples
from onnx_lowrank.data.shapes import concrete_shapes
from onnx_lowrank.errors import InputError
from tests.helpers.sample_files import F32, TEXT, X, load, named, npz, rows


def fails(path: Path, message: str, specs: Sequence[InputSpec] = X, **kwargs: object) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(path, specs, **kwargs)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)


def test_npz_is_cut_to_the_batch(tmp_path: Path) -> None:
    samples = load(npz(tmp_path / "d.npz", x=rows(7)), dims={"n": 3})
    assert (samples.total, len(samples.feeds), samples.source) == (2, 2, str(tmp_path / "d.npz"))
    assert np.array_equal(samples.feeds[1]["x"], rows(7)[3:6])
    assert samples.expected == (None, None)
    assert samples.shapes == {"x": (3, 2)}
    assert any("1 of 7 rows do not fill a batch of 3" in note for note in samples.notes)
    assert [feed["x"].shape for feed in samples.feeds[:5]] == [(3, 2), (3, 2)]
    with pytest.raises(IndexError):
        samples.feeds[2]


def test_plain_npz_has_no_notes(tmp_path: Path) -> None:
    assert load(npz(tmp_path / "d.npz", x=rows(2))).notes == ()


def test_choice_is_seeded_and_keeps_the_order(tmp_path: Path) -> None:
    path = npz(tmp_path / "d.npz", x=rows(50))

    def chosen(seed: int) -> list[float]:
        return [float(feed["x"][0, 0]) for feed in load(path, limit=8, seed=seed).feeds]

    assert chosen(1) == chosen(1) == sorted(chosen(1))
    assert len(set(chosen(1))) == 8
    assert chosen(1) != chosen(2)
    samples = load(path, limit=8, seed=1)
    assert samples.total == 50
    assert samples.notes == ("8 of 50 samples are used, chosen with seed 1",)


def test_data_overrules_assumed_lengths(tmp_path: Path) -> None:
    ids = np.zeros((4, 10), np.int64)
    samples = load(npz(tmp_path / "d.npz", ids=ids, mask=ids), TEXT)
    assert samples.shapes == {"ids": (1, 10), "mask": (1, 10)}
    wanted = "the data's own sizes are used, not the assumed ids [1, 64], mask [1, 64]"
    assert samples.notes == (wanted,)


def test_given_lengths_are_kept(tmp_path: Path) -> None:
    ids = np.zeros((4, 10), np.int64)
    path = npz(tmp_path / "d.npz", ids=ids, mask=ids)
    fails(
        path, r"input 'ids': axis 1 is fixed to 12 by the options, got 10", TEXT, dims={"seq": 12}
    )


def test_one_symbol_two_sizes(tmp_path: Path) -> None:
    path = npz(tmp_path / "d.npz", ids=np.zeros((4, 10), int), mask=np.zeros((4, 9), int))
    fails(path, r"input 'mask': axis 1 is 'seq', which is 10 in 'ids', got 9", TEXT)


def test_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", rows(3))
    assert np.array_equal(load(tmp_path / "d.npy").feeds[2]["x"], rows(3)[2:])
    fails(tmp_path / "d.npy", "one input, this one has 2", TEXT)


def test_large_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", rows(200_000))
    samples = load(tmp_path / "d.npy", dims={"n": 100_000})
    assert np.array_equal(samples.feeds[1]["x"], rows(200_000)[100_000:])


def test_scalar_inputs(tmp_path: Path) -> None:
    specs = (*X, InputSpec("s", F32, ()))
    each = load(npz(tmp_path / "a.npz", x=rows(3), s=np.array([5, 6, 7], np.float32)), specs)
    assert [float(feed["s"]) for feed in each.feeds] == [5, 6, 7]
    one = load(npz(tmp_path / "b.npz", x=rows(3), s=np.float32(5)), specs)
    assert [float(feed["s"]) for feed in one.feeds] == [5, 5, 5]


def test_unknown_rank_takes_the_data(tmp_path: Path) -> None:
    samples = load(npz(tmp_path / "d.npz", x=rows(3)), (InputSpec("x", F32, None),))
    assert samples.shapes == {"x": (1, 2)}
    fails(
        npz(tmp_path / "e.npz", x=rows(3)),
        r"expected rank 3 \[1, 2, 3\], got \[3, 2\]",
        (InputSpec("x", F32, None),),
        shapes={"x": (1, 2, 3)},
    )


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (np.int32, np.int64),
        (np.int64, np.int32),
        (np.uint8, np.float32),
        (np.float64, np.float32),
        (np.float32, ml_dtypes.bfloat16),
        (np.float16, np.float64),
        (np.bool_, np.int64),
    ],
)
def test_lossless_casts(tmp_path: Path, source: type, target: type) -> None:
    path = npz(tmp_path / "d.npz", x=np.array([[1, 0]], source))
    samples = load(path, (InputSpec("x", np.dtype(target), ("n", 2)),))
    assert samples.feeds[0]["x"].dtype == np.dtype(target)
    assert samples.feeds[0]["x"].astype(int).tolist() == [[1, 0]]
    assert samples.notes == (
        f"input 'x': {np.dtype(source).name} data was cast to {np.dtype(target).name}",
    )


@pytest.mark.parametrize(
    ("values", "target", "message"),
    [
        (np.array([[1, 0]], np.float32), np.int64, "expected int64, got float32"),
        (np.array([[1, 0]], np.float32), np.bool_, "expected bool, got float32"),
        (
            np.array([[2**40, 0]], np.int64),
            np.int32,
            r"expected int32, got int64 with values .*1099511627776",
        ),
        (np.array([[2, 0]], np.int64), np.bool_, "expected bool, got int64 with values"),
        (np.array([[2**24 + 1, 0]], np.int64), np.float32, "got int64 with values"),
        (np.array([[1e300, 0]], np.float64), np.float32, "got float64 with values"),
        (np.array([[1e6, 0]], np.float32), np.float16, "got float32 with values"),
        (np.array([["a", "b"]]), np.float32, "expected float32, got <U1"),
        (np.array([[1, 0]], np.complex64), np.float32, "expected float32, got complex64"),
    ],
)
def test_wrong_types(tmp_path: Path, values: object, target: type, message: str) -> None:
    path = npz(tmp_path / "d.npz", x=values)  # type: ignore[arg-type]
    fails(path, message, (InputSpec("x", np.dtype(target), ("n", 2)),))


def test_big_endian_and_raw_bfloat16(tmp_path: Path) -> None:
    samples = load(npz(tmp_path / "d.npz", x=rows(1).astype(">f4")))
    assert samples.feeds[0]["x"].dtype == F32
    assert samples.notes == ()
    small = (InputSpec("x", np.dtype(ml_dtypes.bfloat16), ("n", 2)),)
    samples = load(npz(tmp_path / "e.npz", x=rows(1).astype(ml_dtypes.bfloat16)), small)
    assert samples.feeds[0]["x"].astype(float).tolist() == [[0, 1]]


def test_strings(tmp_path: Path) -> None:
    path = npz(tmp_path / "d.npz", x=np.array([["a", "ö"]]))
    samples = load(path, (InputSpec("x", np.dtype(object), ("n", 2)),))
    assert samples.feeds[0]["x"].tolist() == [["a", "ö"]]
    assert samples.feeds[0]["x"].dtype == object


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"xx": rows(1)},
            r"expected arrays \[x\], got \[xx\]: missing 'x'; no input 'xx', did you",
        ),
        ({"x": rows(1), "q": rows(1)}, r"got \[q, x\]: no input 'q'"),
        ({}, "holds no array"),
        ({"x": np.zeros((2, 3), np.float32)}, r"axis 1 is fixed to 2 in the model, got 3"),
        ({"x": np.zeros(4, np.float32)}, r"expected rank 2 \[1, 2\], got \[4\]"),
        ({"x": np.zeros((0, 2), np.float32)}, r"expected data, got an empty array \[0, 2\]"),
        ({"x": np.array([[None, 1]], object)}, "Python objects"),
    ],
)
def test_wrong_npz(tmp_path: Path, arrays: dict[str, npt.ArrayLike], message: str) -> None:
    fails(npz(tmp_path / "d.npz", **arrays), message)


def test_too_few_rows(tmp_path: Path) -> None:
    path = npz(tmp_path / "d.npz", x=rows(3))
    fails(path, "at least one batch of 4 along axis 0, got 3", dims={"n": 4})


def test_different_counts(tmp_path: Path) -> None:
    path = npz(tmp_path / "d.npz", ids=np.zeros((4, 3), int), mask=np.zeros((5, 3), int))
    fails(path, "as many samples for every input, got ids 4, mask 5", TEXT)


def test_labels_and_outputs_are_left_out_and_said(tmp_path: Path) -> None:
    samples = load(npz(tmp_path / "d.npz", x=rows(2), labels=[1, 2], y=[3, 4]))
    assert list(samples.feeds[0]) == ["x"]
    assert [note.split(": ")[1].split(" is")[0] for note in samples.notes] == ["'labels'", "'y'"]


def test_nan_and_inf_are_said(tmp_path: Path) -> None:
    values = rows(3)
    values[1] = np.nan, np.inf
    (note,) = load(npz(tmp_path / "d.npz", x=values)).notes
    assert "input 'x' holds 2 NaN or Inf of 2 values" in note


def test_broken_files(tmp_path: Path) -> None:
    path = npz(tmp_path / "d.npz", x=rows(1000))
    data = path.read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[:500])
    fails(tmp_path / "cut.npz", "expected an .npz archive of arrays")
    middle = bytearray(data)
    middle[600:700] = bytes(100)
    (tmp_path / "bad.npz").write_bytes(middle)
    fails(tmp_path / "bad.npz", "expected an .npz archive of arrays: .*CRC")
    (tmp_path / "text.npz").write_text("hello")
    fails(tmp_path / "text.npz", "not a zip file")
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    fails(tmp_path / "other.npz", "expected arrays only, 'readme.txt' is none")
    np.save(tmp_path / "d.npy", rows(1000))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "d.npy").read_bytes()[:500])
    fails(tmp_path / "cut.npy", "expected an .npy array")
    (tmp_path / "text.npy").write_text("hello world")
    fails(tmp_path / "text.npy", "expected an .npy array")
    np.save(tmp_path / "o.npy", np.array([None]), allow_pickle=True)
    fails(tmp_path / "o.npy", "Python objects")


def test_wrong_paths(tmp_path: Path) -> None:
    fails(tmp_path / "missing.npz", "no such file or folder")
    (tmp_path / "d.csv").write_text("1,2")
    fails(tmp_path / "d.csv", r"expected .npz, .npy or a folder .* got a file '.csv'")
    fails(tmp_path, "expected .npz files, test_data_set_")


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(value.SerializeToString())


@pytest.mark.parametrize("optional", [False, True])
def test_sequences_and_optional_values(optional: bool, tmp_path: Path) -> None:
    x = InputSpec("x", F32, None, "sequence", optional)
    y = InputSpec("y", F32, None, "tensor", optional)
    pair = [np.ones((2, 3), np.float32), np.zeros((1, 2), np.float32)]
    folder = tmp_path / "test_data_set_0"
    make = numpy_helper.from_optional if optional else None
    write(folder / "input_0.pb", (make or numpy_helper.from_list)(pair, "x"))
    write(folder / "input_1.pb", (make or numpy_helper.from_array)(pair[0], "y"))
    write(folder / "output_0.pb", numpy_helper.from_list(pair, "z"))
    shapes = concrete_shapes((x, y), {}, {})
    found = load_samples(
        tmp_path, (x, y), shapes, limit=4, seed=0, outputs=[InputSpec("z", F32, None, "sequence")]
    )
    feed = found.feeds[0]
    assert [item.tolist() for item in feed["x"]] == [item.tolist() for item in pair]
    assert feed["y"].tolist() == pair[0].tolist()
    assert found.expected[0] is not None
    assert found.expected[0]["z"].tolist() == [1.0] * 6 + [0.0] * 2


def test_an_optional_value_that_is_none(tmp_path: Path) -> None:
    x = InputSpec("x", F32, None, "sequence", optional=True)
    y = InputSpec("y", F32, (2,))
    folder = tmp_path / "test_data_set_0"
    write(folder / "input_0.pb", numpy_helper.from_optional(None, "x"))
    write(folder / "input_1.pb", numpy_helper.from_array(np.ones(2, np.float32), "y"))
    assert list(load(tmp_path, (x, y)).feeds[0]) == ["y"]


@pytest.mark.parametrize("optional", [False, True])
def test_a_tensor_where_a_sequence_is_expected(optional: bool, tmp_path: Path) -> None:
    x = InputSpec("x", F32, None, "sequence", optional)
    tensor = np.ones(2, np.float32)
    make = numpy_helper.from_optional if optional else numpy_helper.from_array
    write(tmp_path / "test_data_set_0" / "input_0.pb", make(tensor, "x"))
    with pytest.raises(InputError, match=r"input_0.pb: expected a sequence of ONNX tensors"):
        load(tmp_path, (x,))


def test_what_the_model_wants_empty_is_no_lack_of_data(tmp_path: Path) -> None:
    empty = (InputSpec("x", F32, (2, 0)),)
    folder = npz(tmp_path / "a.npz", x=np.ones((2, 0), np.float32)).parent
    assert load(folder, empty).feeds[0]["x"].shape == (2, 0)
    with pytest.raises(InputError, match="empty"):
        load(folder, (InputSpec("x", F32, (2, "n")),))


def test_input_that_is_no_tensor(tmp_path: Path) -> None:
    specs = (InputSpec("s", np.dtype(object), None, "Sequence(Sequence(Tensor(FLOAT)))"),)
    path = npz(tmp_path / "d.npz", s=rows(1))
    with pytest.raises(
        InputError, match=r"input 's': expected a tensor or .*, the model wants Seq"
    ):
        load(path, specs)
    optional = (*X, InputSpec("o", np.dtype(object), None, "Optional(…)", optional=True))
    assert list(load(npz(tmp_path / "e.npz", x=rows(1)), optional).feeds[0]) == ["x"]


DECODER = (
    InputSpec("input_ids", np.dtype(np.int64), ("batch", "seq")),
    InputSpec("attention_mask", np.dtype(np.int64), ("batch", "total")),
    InputSpec("past_key_values.0.key", np.dtype(np.float32), ("batch", 2, "past", 4)),
)


@pytest.mark.parametrize(
    ("dims", "sizes"),
    [
        ({}, (64, 64, 128)),
        ({"seq": 1}, (64, 1, 65)),
        ({"past": 0}, (0, 64, 64)),
        ({"total": 64}, (0, 64, 64)),
        ({"total": 65, "seq": 1}, (64, 1, 65)),
        ({"total": 80, "past": 70}, (70, 10, 80)),
        ({"total": 8}, (0, 8, 8)),
    ],
)
def test_the_lengths_of_a_decoder_make_a_step(
    dims: dict[str, int], sizes: tuple[int, int, int]
) -> None:
    found = concrete_shapes(DECODER, {}, dims)
    assert (found.dims["past"], found.dims["seq"], found.dims["total"]) == sizes
    assert found.shapes["attention_mask"] == (1, sizes[2])
    assert len(found.assumed["attention_mask"]) == 2 - ("total" in dims)


def test_a_cache_may_be_empty(tmp_path: Path) -> None:
    """The first step of a decoder in one folder with later ones."""
    for number, past in enumerate((0, 3)):
        arrays: dict[str, npt.ArrayLike] = {
            "input_ids": np.ones((1, 3), np.int64),
            "attention_mask": np.ones((1, 3 + past), np.int64),
            "past_key_values.0.key": np.ones((1, 2, past, 4), np.float32),
        }
        npz(tmp_path / f"{number}.npz", **arrays)
    shapes = concrete_shapes(DECODER, {}, {})
    found = load_samples(tmp_path, DECODER, shapes, limit=4, seed=0, outputs=named("y"))
    assert [feed["past_key_values.0.key"].shape[2] for feed in found.feeds] == [0, 3]


def test_samples_of_nothing_are_refused(tmp_path: Path) -> None:
    specs = (InputSpec("x", np.dtype(np.float32), (1, "n")),)
    np.savez(tmp_path / "d.npz", x=np.ones((1, 0), np.float32))
    with pytest.raises(InputError, match="empty arrays only"):
        load_samples(
            tmp_path / "d.npz", specs, concrete_shapes(specs, {}, {}),
            limit=4, seed=0, outputs=named("y"),
        )  # fmt: skip
