"""Addresses of clusters, and clusters that are not there."""

from __future__ import annotations

import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from onnx_lowrank.errors import InputError, UsageError
from onnx_lowrank.numerics.crew import Crew
from onnx_lowrank.runtime import cluster as module
from onnx_lowrank.runtime.cluster import scheduler_of, versions, working


def test_addresses() -> None:
    assert scheduler_of("dask://host:8786") == "tcp://host:8786"
    assert scheduler_of("dask://10.0.0.1:1/") == "tcp://10.0.0.1:1"
    assert scheduler_of("dask://[::1]:8786") == "tcp://[::1]:8786"


@pytest.mark.parametrize(
    "text",
    [
        *("", "dask", "host:8786", "tcp://host:8786", "dask://host", "dask://host:0"),
        *("dask://:8786", "dask://host:65536", "dask://host:port", "dask://a b:1"),
        "dask://host:1/x",
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError, match=r"executor='.*': expected dask://HOST:PORT"):
        scheduler_of(text)


def test_an_executor_of_the_caller_stays_open() -> None:
    with ThreadPoolExecutor(1) as pool:
        with working(pool, Crew(keeper=None)) as crew:
            assert crew.executor is pool
        assert pool.submit(len, "open").result() == 4
    with working(None) as crew:
        assert crew.executor is None


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with (
        pytest.raises(InputError, match=r"dask://here:1'.*pip install 'onnx-lowrank\[dask\]'"),
        working("dask://here:1"),
    ):
        pass


@pytest.mark.parametrize("listens", [False, True])
def test_no_scheduler(listens: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody there, or somebody who does not speak."""
    pytest.importorskip("distributed", reason="distributed is not installed")
    monkeypatch.setattr(module, "TIMEOUT", 1.0)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        if listens:
            other.listen()
        address = f"dask://127.0.0.1:{other.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(InputError) as caught, working(address):
            pass
        assert time.monotonic() - start < 60
    text = str(caught.value)
    assert text.startswith(f"executor='{address}': expected a Dask scheduler that answers within")
    assert "\n" not in text


def test_versions_are_those_of_this_process() -> None:
    import numpy as np

    assert versions()["numpy"] == np.__version__
    assert "onnx-lowrank" in versions()
