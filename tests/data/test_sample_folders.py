"""Samples from folders: one file for each, and the test data of ONNX."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from onnx_lowrank.data.declared import InputSpec
from onnx_lowrank.errors import InputError
from tests.helpers.sample_files import TEXT, load, npz, rows


def test_folder_of_npz(tmp_path: Path) -> None:
    for length in (3, 5):
        ids = np.full((2, length), length)
        npz(tmp_path / f"{length}.npz", ids=ids, mask=ids)
    samples = load(tmp_path, TEXT)
    assert [feed["ids"].shape for feed in samples.feeds] == [(2, 3), (2, 5)]
    assert len(samples.notes) == 1  # the sizes of ids and of mask are the data's
    one = load(tmp_path, TEXT, limit=1, seed=3)
    assert (len(one.feeds), one.total) == (1, 2)
    with pytest.raises(
        InputError, match=r"3\.npz: input 'ids': axis 0 is fixed to 1 by the option"
    ):
        load(tmp_path, TEXT, dims={"batch": 1})


def test_feeds_are_read_when_asked_for(tmp_path: Path) -> None:
    npz(tmp_path / "a.npz", x=rows(1))
    samples = load(tmp_path)
    (tmp_path / "a.npz").unlink()
    with pytest.raises(InputError, match=r"a\.npz: cannot be read: No such file"):
        samples.feeds[0]


def test_broken_feed_shows_at_once(tmp_path: Path) -> None:
    npz(tmp_path / "a.npz", x=rows(1))
    (tmp_path / "b.npz").write_text("x")
    with pytest.raises(InputError, match=r"b\.npz"):
        load(tmp_path)


def pb(path: Path, array: npt.NDArray[np.generic], name: str = "") -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(numpy_helper.from_array(array, name).SerializeToString())


def test_test_data_sets(tmp_path: Path) -> None:
    ids, mask = np.ones((1, 4), np.int64), np.zeros((1, 4), np.int64)
    for number in (0, 2, 10):
        folder = tmp_path / f"test_data_set_{number}"
        pb(folder / "input_0.pb", ids + number)
        pb(folder / "input_1.pb", mask)
        if number != 2:
            pb(folder / "output_0.pb", np.array([number], np.float32))
    samples = load(tmp_path, TEXT)
    assert [int(feed["ids"][0, 0]) for feed in samples.feeds] == [1, 3, 11]
    assert [item and float(item["y"][0]) for item in samples.expected] == [0, None, 10]
    single = load(tmp_path / "test_data_set_2", TEXT)
    assert (len(single.feeds), single.expected[0]) == (1, None)


def test_tensor_names_win_over_numbers(tmp_path: Path) -> None:
    folder = tmp_path / "test_data_set_0"
    pb(folder / "input_0.pb", np.zeros((1, 4), np.int64), "mask")
    pb(folder / "input_1.pb", np.ones((1, 4), np.int64), "ids")
    assert load(tmp_path, TEXT).feeds[0]["ids"].all()


def test_wrong_test_data(tmp_path: Path) -> None:
    folder = tmp_path / "test_data_set_0"
    pb(folder / "input_0.pb", rows(1))
    pb(folder / "input_1.pb", rows(1))
    with pytest.raises(InputError, match=r"input_1\.pb: the model has 1 inputs \(x\)"):
        load(tmp_path)
    pb(folder / "input_1.pb", rows(1), "x")
    with pytest.raises(InputError, match=r"input_1\.pb: .* got 'x' twice"):
        load(tmp_path)
    (folder / "input_1.pb").unlink()
    for content in (b"", b"\xff\xff\xff", b"\x08\x01"):
        (folder / "input_0.pb").write_bytes(content)
        if content == b"\x08\x01":
            content = onnx.TensorProto(data_type=1, dims=[5], raw_data=b"123").SerializeToString()
            (folder / "input_0.pb").write_bytes(content)
        with pytest.raises(InputError, match=r"input_0\.pb: expected a serialized ONNX tensor"):
            load(tmp_path)
    away = onnx.TensorProto(data_type=1, dims=[1, 2], data_location=TensorProto.EXTERNAL)
    away.external_data.add(key="location", value="/etc/passwd")
    (folder / "input_0.pb").write_bytes(away.SerializeToString())
    with pytest.raises(InputError, match="values are in another file"):
        load(tmp_path)
    pb(folder / "input_0.pb", rows(1))
    (folder / "output_0.pb").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"output_0\.pb"):
        load(tmp_path)


def test_string_tensors(tmp_path: Path) -> None:
    tensor = numpy_helper.from_array(np.array([["a", "b"]], object), "x")
    (tmp_path / "input_0.pb").write_bytes(tensor.SerializeToString())
    samples = load(tmp_path, (InputSpec("x", np.dtype(object), ("n", 2)),))
    assert samples.feeds[0]["x"].tolist() == [["a", "b"]]


def test_both_kinds_in_one_folder(tmp_path: Path) -> None:
    pb(tmp_path / "input_0.pb", rows(1))
    npz(tmp_path / "a.npz", x=rows(1))
    (note,) = load(tmp_path).notes
    assert "1 .npz files beside the .pb test data were left out" in note
