from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from onnx_lowrank.data.declared import InputSpec
from onnx_lowrank.data.labels import read_labels
from onnx_lowrank.data.loading import load_samples
from onnx_lowrank.data.samples import Samples
from onnx_lowrank.data.shapes import concrete_shapes
from onnx_lowrank.data.sources import load_source
from onnx_lowrank.errors import InputError, UsageError
from onnx_lowrank.evaluation.metrics import Metric
from onnx_lowrank.evaluation.reading import Reading
from onnx_lowrank.numerics.arrays import Array
from tests.helpers.models import linear_model

X = (InputSpec("x", np.dtype(np.float32), ("n", 2)),)


def outputs(*arrays: npt.ArrayLike, name: str = "y") -> list[dict[str, Array]]:
    return [{name: np.asarray(array, np.float32)} for array in arrays]


def user(tmp_path: Path, body: str) -> Metric:
    (tmp_path / "score.py").write_text(f"import numpy as np\n{body}\n")
    return Metric.parse(f"{tmp_path / 'score.py'}:score")


def fails(metric: Metric, message: str, *arguments: Any) -> None:
    with pytest.raises(InputError, match=message) as caught:
        metric.evaluate(*arguments)
    assert "\n" not in str(caught.value)


# --- built-in ones


def test_relative_l2_is_the_mean_over_samples_and_outputs() -> None:
    reference = [{"a": np.array([3.0, 4.0]), "b": np.array([1.0])} for _ in range(2)]
    found = [
        {"a": np.array([3.0, 4.5]), "b": np.array([1.0])},  # 0.1, 0
        {"a": np.array([0.0, 0.0]), "b": np.array([1.3])},  # 1, 0.3
    ]
    metric = Metric.parse("relative-l2")
    assert not metric.higher_is_better
    assert metric.evaluate(found, reference) == pytest.approx((0.1 + 1 + 0 + 0.3) / 4)
    assert metric.evaluate(reference, reference) == 0


def test_cosine_is_what_is_missing_to_one() -> None:
    metric = Metric.parse("cosine")
    assert metric.higher_is_better
    reference = outputs([1, 0], [1, 0])
    assert metric.evaluate(outputs([2, 0], [0, 5]), reference) == pytest.approx(0.5)
    assert metric.evaluate(outputs([-1, 0], [-1, 0]), reference) == pytest.approx(2)


def test_nan_in_one_model_is_an_infinite_error_and_said() -> None:
    meter = Metric.parse("relative-l2").meter()
    found, reference = outputs([np.nan], [1])
    meter.add(found, reference)
    assert meter.result().loss == math.inf
    assert "NaN" in next(iter(meter.notes))


def test_top1_without_labels_counts_rows_that_agree() -> None:
    metric = Metric.parse("top1")
    reference = outputs([[1, 2, 0], [5, 1, 1]], [[0, 0, 1]])
    found = outputs([[1, 9, 0], [1, 5, 1]], [[0, 0, 1]])
    assert metric.evaluate(found, reference) == pytest.approx(1 / 3)


def test_top1_with_labels_is_the_drop_of_the_accuracy() -> None:
    meter = Metric.parse("top1").meter()
    reference = outputs([[1, 2], [5, 1]], [[3, 1], [1, 2]])  # 1 0 | 0 1
    found = outputs([[2, 1], [1, 5]], [[3, 1], [1, 2]])  # 0 1 | 0 1
    labels = [np.array([1, 1]), np.array([0, -100])]  # the last row has none
    for own, original, label in zip(found, reference, labels, strict=True):
        meter.add(own, original, label)
    judged = meter.result()
    assert (judged.before, judged.after) == pytest.approx((2 / 3, 2 / 3))
    assert judged.loss == 0
    assert judged.samples == 2


def test_top1_with_labels_may_rise() -> None:
    metric = Metric.parse("top1")
    loss = metric.evaluate(outputs([[0, 1]]), outputs([[1, 0]]), [np.array([[1.0]])])
    assert loss == -1


def test_top1_any_of_several_largest_is_right_and_nan_never() -> None:
    metric = Metric.parse("top1")
    tied = outputs([[1, 1, 0]])
    assert metric.evaluate(tied, outputs([[0, 1, 0]]), [np.array([1])]) == 0
    lost = outputs([[np.nan, np.nan, np.nan]])
    assert metric.evaluate(lost, outputs([[1, 0, 0]]), [np.array([0])]) == 1
    assert metric.evaluate(lost, outputs([[1, 0, 0]])) == 1


def test_top1_looks_at_the_classifiers() -> None:
    metric = Metric.parse("top1")
    reference = [{"p": np.array([[0.9, 0.1]]), "h": np.array([[1.0, 2.0]])}]
    found = [{"p": np.array([[0.9, 0.1]]), "h": np.array([[2.0, 1.0]])}]
    assert metric.evaluate(found, reference, None, Reading(frozenset({"p"}))) == 0
    assert metric.evaluate(found, reference, None, Reading(frozenset({"h"}))) == 1
    fails(metric, r"one output \[rows, classes\] .* got p \[1, 2\], h \[1, 2\]", found, reference)


def test_top1_of_classes_themselves() -> None:
    metric = Metric.parse("top1")
    before, after = ([{"y": np.array(ids)}] for ids in ([3, 1, 2, 0], [3, 1, 1, 0]))
    assert metric.evaluate(after, before) == 0.25
    labels = [np.array([3, 0, 1, -1])]  # the last row has none
    assert metric.evaluate(after, before, labels) == pytest.approx(1 / 3 - 2 / 3)


def test_cosine_of_single_numbers_is_no_metric() -> None:
    with pytest.raises(InputError, match="more than one element in a sample"):
        Metric.parse("cosine").evaluate(outputs([[1.0]]), outputs([[2.0]]))


def test_top1_says_which_output_it_took() -> None:
    meter = Metric.parse("top1").meter()
    sample = {"p": np.array([[0.9, 0.1]]), "label": np.array([0])}
    meter.add(sample, sample)
    assert list(meter.notes) == ["metric='top1': output 'p' is taken for a classifier's"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[0, 1, 1]], r"sample 0: output 'y': expected 2 labels, .* of \[2, 3\], got 3"),
        ([[0, 3]], r"expected labels from 0 to 2 .* got 3"),
        ([[0, 0.5]], "expected labels from 0 to 2 .* got 0.5"),
        ([["cat", "dog"]], "expected numbers of classes as labels, got 'cat'"),
    ],
)
def test_wrong_labels(labels: Sequence[Any], message: str) -> None:
    sample = outputs(np.eye(2, 3))
    fails(Metric.parse("top1"), message, sample, sample, [np.asarray(row) for row in labels])


@pytest.mark.parametrize("name", ["relative-l2", "cosine", "top1"])
def test_other_shapes_name_the_sample(name: str) -> None:
    found, reference = outputs([[1, 2]], [[1, 2, 3]]), outputs([[1, 2]], [[1, 2]])
    fails(Metric.parse(name), "sample 1: output 'y'", found, reference)


def test_no_sample() -> None:
    fails(Metric.parse("cosine"), "at least one sample", [], [])


@pytest.mark.parametrize("text", ["accuracy", "top-1", "score.py", ":f", "a.py:not a name", ""])
def test_unknown_metric(text: str) -> None:
    with pytest.raises(
        UsageError, match=r"expected relative-l2, cosine, top1, kl, perplexity, file"
    ):
        Metric.parse(text)


# --- the user's


def test_a_function_gets_outputs_reference_and_labels(tmp_path: Path) -> None:
    metric = user(
        tmp_path,
        """
from beside import weight
def score(outputs, reference, labels):
    assert set(outputs) == set(reference) == {"y"}
    return weight * np.mean(outputs["y"].argmax(-1) == labels) + reference["y"].sum()""",
    )
    (tmp_path / "beside.py").write_text("weight = 2")
    reference, found = outputs([[1, 0]], [[0, 1]]), outputs([[1, 0]], [[1, 0]])
    labels = [np.array([0]), np.array([1])]
    assert metric.higher_is_better
    assert metric.evaluate(found, reference, labels) == pytest.approx(1.0)
    meter = metric.meter()
    meter.add(found[1], reference[1], labels[1])
    judged = meter.result()
    assert (judged.before, judged.after, judged.loss) == (3.0, 1.0, 2.0)


def test_a_function_without_labels_gets_none(tmp_path: Path) -> None:
    metric = user(tmp_path, "def score(outputs, reference, labels):\n    return labels is None")
    assert metric.evaluate(outputs([1]), outputs([1])) == 0


def test_a_function_is_loaded_once(tmp_path: Path) -> None:
    metric = user(
        tmp_path,
        f"""
with open({str(tmp_path / "log")!r}, "a") as log:
    log.write("loaded ")
def score(outputs, reference, labels):
    return 1""",
    )
    for _ in range(3):
        assert metric.evaluate(outputs([1]), outputs([1])) == 0
    assert (tmp_path / "log").read_text() == "loaded "


def test_a_function_cannot_spoil_the_outputs(tmp_path: Path) -> None:
    metric = user(tmp_path, "def score(o, r, labels):\n    o['y'] *= 0; o.clear(); return 1")
    found = outputs([7])
    assert metric.evaluate(found, outputs([7])) == 0
    assert found[0]["y"] == [7]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "def score(o, r, l):\n    if o['y'][0] > 1:\n        raise ValueError('too\\nlarge')\n"
            "    return 0",
            r"score.py:score': sample 1: ValueError: too large$",
        ),
        ("def score(o, r, l): return None", "sample 0: expected a finite number, got None"),
        ("def score(o, r, l): return float('nan')", "sample 0: .* got nan"),
        ("def score(o, r, l): return '1'", "sample 0: .* got '1'"),
        ("def score(o, r, l): return o['y']", "sample 0: .* got array"),
        ("def score(o): return 1", "sample 0: TypeError: score"),
        ("def score(o, r, l): exit(3)", "sample 0: SystemExit: 3"),
        ("def other(): pass", "score.py:score: AttributeError"),
        ("score = 3", "expected a function, got int"),
        ("import not_there_at_all", "score.py:score: ModuleNotFoundError"),
    ],
)
def test_a_function_that_fails(tmp_path: Path, body: str, message: str) -> None:
    samples = outputs([1], [2])
    fails(user(tmp_path, body), message, samples, samples)


def test_no_such_file(tmp_path: Path) -> None:
    fails(Metric.parse(f"{tmp_path}/none.py:score"), "no such file .*none.py", [], [])


# --- labels


def load(path: Path, **options: Any) -> Samples:
    dims = options.pop("dims", {})
    shapes = concrete_shapes(X, {}, dims)
    outputs = [InputSpec(options.pop("output", "out"), np.dtype(np.float32), None)]
    given: Mapping[str, Any] = {"limit": 100, "seed": 0, "outputs": outputs, **options}
    return load_samples(path, X, shapes, **given)


def rows(count: int) -> Array:
    return np.arange(2 * count, dtype=np.float32).reshape(count, 2)


def given(samples: Samples) -> list[list[Any]] | None:
    return None if samples.labels is None else [label.tolist() for label in samples.labels]


@pytest.mark.parametrize("name", ["labels", "label", "targets", "target", "y"])
def test_labels_among_the_data_are_cut_as_the_samples(tmp_path: Path, name: str) -> None:
    np.savez(tmp_path / "d.npz", allow_pickle=False, x=rows(5), **{name: np.arange(5)})
    samples = load(tmp_path / "d.npz", dims={"n": 2})
    assert given(samples) == [[0, 1], [2, 3]]
    assert any(f"{name!r} is not an input" in note and "labels" in note for note in samples.notes)
    assert given(samples.part([1])) == [[2, 3]]


def test_the_models_own_outputs_are_no_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=rows(2), y=[1, 2])
    assert load(tmp_path / "d.npz", output="y").labels is None


def test_labels_follow_a_choice_of_the_samples(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=rows(50), y=rows(50)[:, 0])
    samples = load(tmp_path / "d.npz", limit=7, seed=3)
    part = samples.part([5, 0])
    for chosen in (samples, part):
        assert chosen.labels is not None
        assert [feed["x"][0, 0] for feed in chosen.feeds] == [label[0] for label in chosen.labels]


def test_a_file_of_labels_goes_before_the_datas_own(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=rows(4), labels=np.zeros(4))
    np.save(tmp_path / "l.npy", np.arange(4))
    samples = load(tmp_path / "d.npz", labels=tmp_path / "l.npy")
    assert given(samples) == [[0], [1], [2], [3]]
    assert any("'labels' is not an input of the model and was left out" in n for n in samples.notes)


def test_one_label_for_each_batch(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", rows(6))
    np.save(tmp_path / "l.npy", [7, 8])
    samples = load(tmp_path / "d.npy", labels=tmp_path / "l.npy", dims={"n": 3})
    assert given(samples) == [[7], [8]]


def test_a_folder_of_feeds(tmp_path: Path) -> None:
    folder = tmp_path / "feeds"
    folder.mkdir()
    for number in range(3):
        np.savez(folder / f"{number}.npz", x=rows(2), y=[number, -number])
    assert given(load(folder)) == [[0, 0], [1, -1], [2, -2]]
    (tmp_path / "l.txt").write_text("a\nb\nc\n")
    assert given(load(folder, labels=tmp_path / "l.txt")) == [["a"], ["b"], ["c"]]
    (tmp_path / "l.txt").write_text("\n".join("123456"))
    assert given(load(folder, labels=tmp_path / "l.txt")) == [[1, 2], [3, 4], [5, 6]]
    (tmp_path / "l.txt").write_text("1\n2\n")
    with pytest.raises(InputError, match=r"labels=.*l.txt': expected 3 labels.*got 2"):
        load(folder, labels=tmp_path / "l.txt")
    np.savez(folder / "1.npz", x=rows(2))
    with pytest.raises(InputError, match=r"1.npz: expected labels for every sample, got 2 for 3"):
        load(folder)


def test_labels_that_do_not_fit(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=rows(4), labels=np.zeros(3))
    with pytest.raises(InputError, match=r"d.npz: labels: expected 4 labels.*got 3"):
        load(tmp_path / "d.npz")
    with pytest.raises(InputError, match=r"expected 2 or 4 labels.*got 3"):
        load(tmp_path / "d.npz", dims={"n": 2})


def test_labels_from_a_callable(tmp_path: Path) -> None:
    (tmp_path / "feeds.py").write_text(
        "import numpy as np\n"
        "def feeds():\n"
        "    for n in range(3):\n"
        "        yield {'x': np.ones((1, 2), np.float32), 'labels': n}\n"
    )
    model = ir.from_proto(linear_model(np.ones((2, 3), np.float32)))
    shapes = concrete_shapes(X, {}, {})
    text = f"{tmp_path / 'feeds.py'}:feeds"
    samples = load_source(text, model, X, shapes, limit=9, seed=0)
    assert given(samples) == [[0], [1], [2]]
    with pytest.raises(InputError, match="expected samples in files"):
        load_source(text, model, X, shapes, limit=9, seed=0, labels=tmp_path / "l.npy")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("l.txt", "3\n1\n2", [3, 1, 2]),
        ("l.csv", "label\n3\n1\n\n", [3, 1]),
        ("l.txt", "0.5\n1", [0.5, 1.0]),
        ("l.csv", "\ufeffcat\r\n dog \r\n", ["cat", "dog"]),
    ],
)
def test_labels_one_a_line(tmp_path: Path, name: str, text: str, expected: list[Any]) -> None:
    (tmp_path / name).write_bytes(text.encode())
    labels = read_labels(tmp_path / name)
    assert labels.tolist() == expected
    assert labels.dtype.kind == {int: "i", float: "f", str: "U"}[type(expected[0])]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.txt", b"", "expected labels along axis 0"),
        ("l.txt", b"1\n\n2", "line 2: expected one label, got ''"),
        ("l.csv", b"1,2\n3,4", "line 1: expected one label, got '1,2'"),
        ("l.txt", b"\xff\xfe\x00", "expected text in UTF-8"),
        ("l.npy", b"1\n2", "expected an .npy array"),
        ("l.npz", b"1\n2", "expected an .npz archive"),
        ("l.json", b"[1]", "expected .npy, .npz, .txt or .csv, got a file '.json'"),
        ("none.npy", None, "no such file"),
    ],
)
def test_wrong_label_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_labels(tmp_path / name)
    assert name in str(caught.value)


def test_an_archive_of_labels_holds_one_array(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", anything=[1, 2])
    assert read_labels(tmp_path / "one.npz").tolist() == [1, 2]
    np.savez(tmp_path / "two.npz", a=[1], b=[2])
    with pytest.raises(InputError, match="expected one array, got a, b"):
        read_labels(tmp_path / "two.npz")
