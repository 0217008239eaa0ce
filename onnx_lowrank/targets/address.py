"""The parts of a target's name: ``kind``, ``kind:rest`` or ``kind://rest``, ``?key=value&…``."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import unquote

from onnx_lowrank.errors import UsageError, named

__all__ = ["Address", "kind_of", "parse"]


@dataclass(frozen=True)
class Address:
    """The parts of a name.

    Attributes:
        rest: what stands between the kind and the question mark.
        options: key -> its values, in order.
    """

    rest: str
    options: dict[str, tuple[str, ...]]

    def get(self, key: str) -> str | None:
        """The value of a key that was given at most once."""
        return self.options.get(key, (None,))[0]


def kind_of(name: str) -> str:
    """What stands before the first colon or question mark."""
    return name.partition("?")[0].partition(":")[0]


def parse(
    name: str, known: Collection[str], *, repeatable: Collection[str] = (), separator: str = ""
) -> Address:
    """Take a name apart.

    Args:
        name: as the user wrote it; its kind is not looked at.
        known: keys that may be given once.
        repeatable: keys that may be given more than once.
        separator: what stands between the kind and the rest.

    Raises:
        UsageError: naming the key that is not known, that is given twice, or that has no value.
    """
    head, _, query = name.partition("?")
    rest = head.partition(separator)[2] if separator else ""
    options: dict[str, tuple[str, ...]] = {}
    for part in filter(None, query.split("&")):
        key, equals, value = part.partition("=")
        if key not in (*known, *repeatable):
            shown = ", ".join((*known, *repeatable))
            raise UsageError(
                f"{named('targets', name)}: expected an option of {shown}; got {key!r}"
            )
        if not equals or not value:
            raise UsageError(f"{named('targets', name)}: expected {key}=VALUE, got {part!r}")
        if key in options and key not in repeatable:
            raise UsageError(f"{named('targets', name)}: {key} is given more than once")
        options[key] = (*options.get(key, ()), unquote(value))
    return Address(unquote(rest), options)
