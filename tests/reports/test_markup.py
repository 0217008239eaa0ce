"""Text cannot break the page that shows it."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from onnx_lowrank.phrases import printable
from onnx_lowrank.reports.markup import joined, name, tag
from tests.helpers.reports import HOSTILE


class Seen(HTMLParser):
    """Elements and text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: list[str] = []
        self.text = ""
        self.values: dict[str, str | None] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.kinds.append(tag)
        self.values.update(attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def seen(html: str) -> Seen:
    parser = Seen()
    parser.feed(html)
    parser.close()
    return parser


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_shown_is_text_and_nothing_else(text: str) -> None:
    found = seen(tag("p", text, name(text), title=text))
    assert found.kinds == ["p", "bdi"]
    assert found.text == 2 * printable(text)
    assert found.values["title"] == printable(text)


def test_signs_that_are_not_seen_are_written_out() -> None:
    assert printable("a\u202eb\nc\x00") == "a\\u202eb\\nc\\x00"
    assert printable("模型 שלום ×") == "模型 שלום ×"
    assert printable("\ud800") == "\\ud800"


def test_elements_may_be_nested_and_left_out() -> None:
    made = tag("div", tag("b", "x"), None, "<", hidden=True, id=None, data_key=3, class_="c")
    assert made == '<div hidden data-key="3" class="c"><b>x</b>&lt;</div>'
    assert joined([tag("br"), "&", None]) == "<br>&amp;"
    assert tag("rect", x=1) == '<rect x="1"/>'
