"""Layers and samples on the workers of an executor: the same bytes as without one."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lowrank import InputError, UsageError, compress, sweep
from onnx_lowrank.fitting import gather
from onnx_lowrank.progress import Advance
from tests.helpers.clusters import cluster
from tests.helpers.commands import call
from tests.helpers.deep import deep, feeds_for
from tests.helpers.models import as_proto, factored

COUNT = 70


class Watching:
    """Calls functions when stages first go on.

    Attributes:
        waiting: those that have not been called.
    """

    def __init__(self, calls: Mapping[str, Callable[[], None]]) -> None:
        self.waiting = dict(calls)

    def plan(self, names: Sequence[str], part: str = "") -> None:
        pass

    def detail(self, text: str) -> None:
        pass

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Advance]:
        def advance(_: int) -> None:
            call = self.waiting.pop(name, None)
            if call is not None:
                call()

        yield advance


def options(rng: np.random.Generator) -> dict[str, Any]:
    feeds = feeds_for(rng, COUNT)
    return {"keep": 0.5, "calibration": feeds, "data": feeds[:6], "check": True, "threads": 1}


def written(model: onnx.ModelProto, **given: Any) -> bytes:
    found: bytes = as_proto(factored(model, **given).model).SerializeToString()
    return found


def test_threads_give_the_same(rng: np.random.Generator) -> None:
    model, given = deep(rng), options(rng)
    with ThreadPoolExecutor(3) as pool:
        assert written(model, **given) == written(model, **given, executor=pool)


def test_an_energy_gives_the_same(rng: np.random.Generator) -> None:
    """Where the spectrum decides of how many components the vectors are wanted."""
    model, given = deep(rng), options(rng)
    given |= {"keep": None, "energy": 0.9, "effort": "quick"}
    with ThreadPoolExecutor(3) as pool:
        assert written(model, **given) == written(model, **given, executor=pool)
        bare = {"energy": 0.9}
        assert written(model, **bare) == written(model, **bare, executor=pool)


def test_processes_give_the_same(rng: np.random.Generator) -> None:
    model, given = deep(rng), options(rng)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        assert written(model, **given) == written(model, **given, executor=pool)


def test_a_sweep_takes_an_executor(rng: np.random.Generator) -> None:
    model, feeds = deep(rng, 3), feeds_for(rng, 24)
    given: dict[str, Any] = {"shares": [0.5], "data": feeds, "bench": False, "simplify": False}
    with ThreadPoolExecutor(2) as pool:
        here, there = sweep(model, **given), sweep(model, **given, executor=pool)
    assert here.points == there.points
    assert there.settings["executor"] == "ThreadPoolExecutor"


def test_parts_depend_on_the_number_of_samples_alone(rng: np.random.Generator) -> None:
    """Samples go out in parts, and a wrong one is named by its number among those to fit to."""
    feeds = feeds_for(rng, 40)
    feeds[37]["x"][0, 0] = np.nan
    model = deep(rng, 2)
    for executor in (None, ThreadPoolExecutor(2)):
        with pytest.raises(
            InputError, match=r"MatMul-0.* holds NaN or Inf in sample 27 of those to fit"
        ):
            factored(model, rank=3, calibration=feeds, executor=executor)


def test_what_cannot_be_sent_is_gathered_here(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = deep(rng, 2), options(rng)
    monkeypatch.setattr("onnx_lowrank.compression.trial.SIZE_LIMIT", 1)

    def refuse(_: object) -> None:
        raise AssertionError("a part was sent")

    monkeypatch.setattr(gather, "summed_elsewhere", refuse)
    with ThreadPoolExecutor(2) as pool:
        result = factored(model, **given, executor=pool)
    (note,) = [note for note in result.report.notes if note.startswith("executor")]
    assert note.endswith("moments are gathered in this process: the model is too large to be sent")


def test_an_executor_that_breaks(rng: np.random.Generator) -> None:
    class Broken(Executor):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("out of order")

    with pytest.raises(InputError, match=r"executor=…: .*RuntimeError: out of order"):
        factored(deep(rng, 2), rank=3, executor=Broken())


def test_what_is_no_executor(rng: np.random.Generator) -> None:
    with pytest.raises(UsageError, match=r"executor=…: expected dask://HOST:PORT, or .*got 3"):
        compress(deep(rng, 1), executor=3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="executor='here': expected dask://HOST:PORT"):
        compress(deep(rng, 1), executor="here")


@pytest.mark.slow  # the processes of a cluster start
def test_workers_of_a_cluster_are_killed(
    rng: np.random.Generator,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their tasks are done by another one; nothing is lost, and no bit is another one."""
    pytest.importorskip("distributed", reason="distributed is not installed")
    model, given = deep(rng), options(rng)
    unbroken = written(model, **given)
    with cluster(tmp_path, 3) as running:

        def kill(number: int) -> None:
            running.workers[number].send_signal(signal.SIGKILL)
            running.workers[number].wait()

        watching = Watching({"calibrate": lambda: kill(0), "measure": lambda: kill(1)})
        found = compress(
            model,
            **given,
            simplify=False,
            bench=False,
            executor=running.address,
            progress=watching,
        )
        assert not watching.waiting
        assert as_proto(found.model).SerializeToString() == unbroken
        monkeypatch.setattr("onnx_lowrank.numerics.crew.PATIENCE", 1.0)
        capsys.readouterr()
        with pytest.raises(InputError, match=r"executor=…: .*all of them have gone"):
            factored(
                model,
                rank=3,
                executor=running.address,
                progress=Watching({"measure": lambda: kill(2)}),
            )
        assert not capsys.readouterr().err
        onnx.save(model, tmp_path / "model.onnx")
        words = [tmp_path / "model.onnx", tmp_path / "out.onnx", "--rank", "3", "--no-simplify"]
        capsys.readouterr()
        monkeypatch.setattr("onnx_lowrank.runtime.cluster.TIMEOUT", 3.0)
        assert call(*words, "--executor", running.address) == 1
    left = capsys.readouterr().err
    assert left.count("\n") == 1
    assert "expected a worker within 3 s, got none" in left
    assert not (tmp_path / "out.onnx").exists()
