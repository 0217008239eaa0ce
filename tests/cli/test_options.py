"""The table of the options against everything that is made from it."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnx_lowrank
from onnx_lowrank.cli.program import cli
from onnx_lowrank.compression.headings import GROUPS
from onnx_lowrank.compression.settings import Settings
from onnx_lowrank.compression.verbs import COMPRESS, SETTINGS, VERBS, Verb
from tests.helpers.commands import COMMAND, call, names, one_line
from tests.helpers.models import known_rank, linear_model
from tests.helpers.places import ROOT


def arguments_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def test_what_is_written_from_the_table_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "write_options.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: str(verb.name))
def test_a_function_takes_what_its_verb_takes(verb: Verb) -> None:
    found = arguments_of(getattr(onnx_lowrank, verb.name))
    text = inspect.getdoc(getattr(onnx_lowrank, verb.name)) or ""
    for option in verb.arguments:
        parameter = found[option.name]
        assert (parameter.annotation, parameter.default) == (option.type, option.default)
        assert re.search(rf"^    {option.name}: ", text, re.MULTILINE), option.name


def test_the_settings_have_the_options_as_fields() -> None:
    fields = Settings.__dataclass_fields__
    assert list(fields) == [option.name for option in SETTINGS]
    for option in SETTINGS:
        if option.kind not in ("shapes", "dims"):
            assert fields[option.name].default == option.default


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: str(verb.name))
def test_the_command_has_every_option(verb: Verb, capfd: pytest.CaptureFixture[str]) -> None:
    own = [] if verb is COMPRESS else [verb.name]
    assert call(*own, "--help") == 0
    shown = capfd.readouterr().out
    assert verb.example in shown
    flags = {flag for p in cli.commands[verb.name].params for flag in p.opts}
    for option in verb.options:
        assert {option.option, *option.aliases} <= flags
        assert option.option in shown
        assert f"\n{option.group}:\n" in shown


def test_the_help_has_an_example_of_each_group(capfd: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    shown = capfd.readouterr().out
    for group, example in GROUPS.items():
        assert f"\n{group}:\n  {example}\n" in shown


def test_examples_name_options_that_exist() -> None:
    known = {"compress": COMPRESS} | {verb.name: verb for verb in VERBS}
    for line in (*GROUPS.values(), *(verb.example for verb in VERBS)):
        words = line.split()
        verb = known.get(words[1], COMPRESS)
        flags = {flag for option in verb.options for flag in (option.option, *option.aliases)}
        assert {word for word in words if word.startswith("--")} <= flags


def test_the_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, onnx_lowrank.cli.program as program; program.exit_code(['--help']); "
        "print({'numpy', 'onnx', 'onnx_ir', 'onnxruntime', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def completed(*words: str, cwd: Path | None = None) -> list[str]:
    """What the completer answers for the last word: a type and a value each."""
    done = subprocess.run(
        [str(COMMAND)],
        env={
            **os.environ,
            "_ONNX_LOWRANK_COMPLETE": "bash_complete",
            "COMP_WORDS": " ".join(["onnx-lowrank", *words]),
            "COMP_CWORD": str(len(words)),
        },
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_the_shell_completes() -> None:
    script = subprocess.run(
        [str(COMMAND)],
        env={**os.environ, "_ONNX_LOWRANK_COMPLETE": "bash_source"},
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    assert "complete -o nosort -F" in script
    # The main job has no name: its options follow the two paths, or come first.
    assert completed("in.onnx", "out.onnx", "--max-e") == ["plain,--max-error"]
    assert completed("--max-e") == ["plain,--max-error"]
    assert completed("in.onnx", "out.onnx", "--for", "we") == ["plain,webgpu"]
    assert completed("in.onnx", "out.onnx", "--data", "sam")[0].startswith("file,")
    first = completed("ch")
    assert "plain,check" in first
    assert any(item.startswith("file,") for item in first)
    assert completed("check", "a.onnx", "b.onnx", "--stri") == ["plain,--strict"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_the_main_job(tmp_path: Path) -> None:
    """As docs/getting-started.md says to set it up."""
    script = """
eval "$(_ONNX_LOWRANK_COMPLETE=bash_source onnx-lowrank)" || exit 1
complete -p onnx-lowrank || exit 1
COMP_WORDS=(onnx-lowrank in.onnx out.onnx --max-e); COMP_CWORD=3
_onnx_lowrank_completion onnx-lowrank
printf "%s\\n" "${COMPREPLY[@]}"
"""
    done = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "PATH": f"{COMMAND.parent}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.stdout.splitlines()[1:] == ["--max-error"], done.stderr


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: str(verb.name))
def test_the_help_fits_the_terminal(
    verb: Verb, width: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert call(*([] if verb is COMPRESS else [verb.name]), "--help") == 0
    assert max(map(len, capfd.readouterr().out.splitlines())) <= width


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.onnx"
    onnx.save(linear_model(known_rank(64, 48, 4, np.random.default_rng(0))), path)
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--energy", "95"), "--energy: expected a number above 0 and up to 1, got 95.0"),
        (("--keep", "0.5", "--rank", "3"), "expected one goal, got --rank and --keep"),
        (("--uniform",), "--uniform needs --keep"),
        (("--no-check", "--max-error", "1"), "--max-error and --no-check exclude each other"),
        (("--calibrate", "a.npz", "--no-calibrate"), "--calibrate and --no-calibrate exclude"),
        (("--for", "warp9"), "--for: expected one of cpu, arm"),
        (("--dim", "N"), "--dim N: expected name=size"),
        (("--rank-multiple", "many"), "--rank-multiple: expected a whole number from 1 or auto"),
        (("--rank-multiple", "auto"), "--rank-multiple auto needs a goal"),
        (("--max-size", "20"), "got 20 bytes; did you mean 20MB?"),
        (("--ops", "gem"), "--ops: expected all, default or some of"),
        (("--external-data", "some"), "--external-data: expected one of auto, always, never"),
        (("--tolerance", "1", "--metric", "best"), "--metric: expected relative-l2"),
    ],
)
def test_a_usage_error_names_the_option(
    options: tuple[str, ...], message: str, source: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call(source, source.with_name("out.onnx"), *options) == 2
    assert message in one_line(capfd.readouterr().err)
    assert names(source.parent) == ["in.onnx"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("check", "A", "A", "--threads", "0"), "--threads: expected a whole number from 1, got 0"),
        (("check", "A", "A", "--max-error", "-1"), "--max-error: expected a number from 0"),
        (("check", "A", "A", "--ep", "cpu", "--ep", "cpu"), "--target cpu: expected each target"),
        (("bench", "A", "--iterations", "0"), "--iterations: expected a whole number from 1"),
        (("bench", "A", "--threads", "0"), "--threads: expected a whole number from 1, got 0"),
        (("sweep", "A", "--out", "D", "--budgets", "80"), "--budgets: .* did you mean 0.8?"),
        (("sweep", "A", "--out", "D", "--budgets", "x"), "--budgets: expected numbers such as 0.8"),
        (("sweep", "A", "--out", "D", "--metric", "best"), "--metric: expected relative-l2"),
        (("sweep", "A", "--out", "D", "--max-error", "1"), "(?i)no such option.*--max-error"),
        (("sweep", "A", "--out", "D", "--save-costs", "c"), "needs --rank-multiple auto"),
    ],
)
def test_verbs_refuse_up_front(
    words: tuple[str, ...], message: str, source: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    there = {"A": str(source), "D": str(source.parent / "curve")}
    assert call(*(there.get(word, word) for word in words)) == 2
    assert re.search(message, one_line(capfd.readouterr().err))
    assert names(source.parent) == ["in.onnx"]
