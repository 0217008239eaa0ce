"""``providers --install``: what is made is whole, and what would not help is said."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest

from onnx_lowrank import InputError, UsageError
from onnx_lowrank.runtime import plugins
from onnx_lowrank.runtime.plugins import PLUGINS, no_use
from onnx_lowrank.targets import arm64_setup, installing, local, setup, web, web_setup
from onnx_lowrank.targets.installing import INSTALLABLE, install
from onnx_lowrank.targets.setup import folder_of, packages, renewed, run, stamped
from tests.helpers.commands import call, error

posix = pytest.mark.skipif(sys.platform == "win32", reason="a shell script plays npm")

_NPM = """#!/bin/sh
[ -n "$NPM_FAILS" ] && { echo "npm warn old" >&2; echo "npm error 404 not there" >&2; exit 1; }
mkdir -p node_modules/onnxruntime-web/dist
echo '{"version": "VERSION"}' > node_modules/onnxruntime-web/package.json
touch node_modules/onnxruntime-web/dist/ort.node.min.mjs
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, with no checkout beside the package and nothing in the environment."""
    monkeypatch.setattr(setup, "__file__", str(tmp_path / "site" / "onnx_lowrank" / "t" / "s.py"))
    monkeypatch.setattr(setup, "user_cache", lambda: tmp_path / "cache" / "onnx-lowrank")
    monkeypatch.delenv("ONNX_LOWRANK_WEB", raising=False)
    monkeypatch.delenv("ONNX_LOWRANK_ARM64", raising=False)
    return tmp_path / "cache" / "onnx-lowrank"


def test_the_environment_then_the_checkout_then_the_cache(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert folder_of("web") == cache / "web"
    (tmp_path / "site" / ".web").mkdir(parents=True)
    assert folder_of("web") == tmp_path / "site" / ".web"
    monkeypatch.setenv("ONNX_LOWRANK_WEB", str(tmp_path / "own"))
    assert folder_of("web") == tmp_path / "own"
    assert folder_of("arm64") == cache / "arm64"


def test_the_cache_is_where_the_system_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    for system, variable, value, wanted in (
        ("linux", "XDG_CACHE_HOME", "", "/home/me/.cache/onnx-lowrank"),
        ("linux", "XDG_CACHE_HOME", "/fast", "/fast/onnx-lowrank"),
        ("darwin", "XDG_CACHE_HOME", "/fast", "/home/me/Library/Caches/onnx-lowrank"),
        ("win32", "LOCALAPPDATA", "/app", "/app/onnx-lowrank"),
    ):
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setenv(variable, value)
        assert setup.user_cache() == Path(wanted)


@posix
def test_the_web_package_is_made_once_and_whole(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(_NPM.replace("VERSION", web_setup.VERSION))
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")
    monkeypatch.setenv("NPM_FAILS", "1")
    assert call("providers", "--install", "web") == 1
    assert error(capsys).strip().endswith("--install web: npm: npm error 404 not there")
    assert not any(cache.iterdir())
    monkeypatch.delenv("NPM_FAILS")
    assert call("providers", "--install", "web", "--install", "web-chromium") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1:] == [
        f"{cache / 'web'}: onnxruntime-web {web_setup.VERSION}",
        f"{cache / 'web'} is there",
    ]
    assert [path.name for path in cache.iterdir()] == ["web"]
    versions = {offer.name: offer.version for offer in web.offers()}
    assert versions["web"] == f"onnxruntime-web {web_setup.VERSION}"


def test_programs_that_are_missing_are_named(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"install='web': no npm here$"):
        install("web", print)
    with pytest.raises(InputError, match=r"install='qemu-arm64': no qemu-aarch64, gcc, apt-get"):
        install("qemu-arm64", print)
    assert packages("npm") is None
    (offer, *_) = web.offers()
    assert offer.install == "onnx-lowrank providers --install web"
    assert not cache.exists()


def test_what_is_made_takes_the_place_of_the_old_one_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "there"
    target.mkdir()
    (target / "old").touch()

    def fails(new: Path) -> None:
        (new / "half").touch()
        raise InputError("no more")

    with pytest.raises(InputError, match="no more"):
        renewed(target, fails, ["old", "new"])
    assert [path.name for path in target.iterdir()] == ["old"]
    with pytest.raises(InputError, match=r"for this target alone, got one that also holds old$"):
        renewed(target, lambda new: (new / "new").touch(), ["new"])
    assert [path.name for path in target.iterdir()] == ["old"]
    renewed(target, lambda new: (new / "new").touch(), ["old", "new"])
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"other": 1}'])
def test_a_damaged_stamp_is_none(text: str, tmp_path: Path) -> None:
    assert stamped(tmp_path / "setup.json", "wanted") is None
    (tmp_path / "setup.json").write_text(text)
    assert stamped(tmp_path / "setup.json", "wanted") is None
    (tmp_path / "setup.json").write_text('{"wanted": {"a": 1}}')
    assert stamped(tmp_path / "setup.json", "wanted") == {"a": 1}


def test_a_program_that_fails_is_one_line(tmp_path: Path) -> None:
    code = "import sys; print('first', file=sys.stderr); sys.exit('the end')"
    with pytest.raises(InputError, match=r"^trying: the end$"):
        run([sys.executable, "-c", code], "trying")
    with pytest.raises(InputError, match=r"trying: .*nowhere"):
        run([tmp_path / "nowhere"], "trying")
    assert run([sys.executable, "-c", "print('fine')"], "trying").strip() == "fine"


def test_plugins_that_cannot_help_are_not_recommended(monkeypatch: pytest.MonkeyPatch) -> None:
    openvino = PLUGINS["openvino"]
    for system, machine, intel, why in (
        ("linux", "x86_64", True, None),
        ("linux", "x86_64", None, None),
        ("linux", "x86_64", False, "it needs an Intel processor, GPU or NPU, and there is none"),
        ("linux", "aarch64", None, "no package of it for linux on aarch64"),
        ("darwin", "arm64", None, "no package of it for darwin on arm64"),
    ):
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr(platform, "machine", lambda name=machine: name)
        monkeypatch.setattr(plugins, "has_intel", lambda known=intel: known)
        monkeypatch.setattr(local, "plugin_version", lambda _: None)
        found = no_use(openvino)
        offer = next(offer for offer in local.offers() if offer.name == "openvino")
        assert (offer.install is None) is (why is not None)
        if why is None:
            assert found is None
            continue
        assert why in str(found)
        assert offer.found.endswith(f"is not installed, and would not help: {found}")
        with pytest.raises(InputError, match="install='openvino': it would not help"):
            install("openvino", print)
    assert no_use(PLUGINS["webgpu"]) is None


def test_a_plugin_that_is_there_is_not_to_be_installed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local, "plugin_version", lambda _: "1.0")
    monkeypatch.setattr(local, "refusal", lambda _: "the plugin offers no device on this machine")
    offers = {offer.name: offer for offer in local.offers()}
    assert offers["openvino"].install is None
    assert offers["openvino"].version == "1.0"


def test_pip_gets_what_the_extra_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def note(command: list[str], *_: object) -> str:
        ran.append(command)
        return ""

    monkeypatch.setattr(installing, "run", note)
    said: list[str] = []
    install("webgpu", said.append)
    assert ran[0][:4] == [sys.executable, "-m", "pip", "install"]
    assert any(word.startswith("onnxruntime-ep-webgpu") for word in ran[0])
    assert said[-1] == f"webgpu: installed into {sys.prefix}"


def test_names_with_nothing_to_install(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="expected one of openvino, qnn, webgpu, qemu-arm64, web"):
        install("cpu", print)
    assert call("providers", "--install", "warp") == 2
    assert "--install warp: expected one of" in error(capsys)
    assert set(PLUGINS) < set(INSTALLABLE)


def test_the_plugin_of_qemu_lies_beside_its_program() -> None:
    assert arm64_setup.counter_source().is_file()
