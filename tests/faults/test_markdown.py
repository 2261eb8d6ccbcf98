"""Names and texts of others in cards and reports: words that are read as they stand, whatever a page is made from them."""

from __future__ import annotations

import html.parser
from dataclasses import replace
from typing import Any

import pytest

from folders import provenance
from regraft.errors import in_code, in_markdown
from regraft.models.card import model_card, table
from regraft.plans import Measurement, from_json, to_json
from regraft.report.page import to_markdown
from regraft.report.summary import RunReport

markdown_it = pytest.importorskip("markdown_it")  # comes with rich

NASTY = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![a](http://example.com/a.png)",
    "[a](javascript:alert(1))",
    "[a]: http://example.com",
    "`</code><b>`",
    "``` \n<b>x</b>\n```",
    "x\n\n<b>y</b>",
    "a | b | <i>",
    "# heading",
    "<!-- ",
    "&lt;b&gt; &amp;",
    "\\`<b>\\`",
    "\x1b[31m\u202e",
    "~~~\n<b>",
    "a\\|b|c",
]


class Tags(html.parser.HTMLParser):
    """Collects what a page does beyond showing words."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.words = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append(tag)

    def handle_data(self, data: str) -> None:
        self.words += data


def page(text: str) -> Tags:
    """Returns a Markdown text as browsers see it, raw HTML let through as most programs do."""
    tags = Tags()
    tags.feed(markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").render(text))
    return tags


@pytest.mark.parametrize("text", NASTY)
def test_words_stay_words(text: str) -> None:
    assert page(in_markdown(text)).found == ["p"]
    assert page(in_code(text)).found == ["p", "code"]
    shown = page("\n".join(table(("a", "b"), [(text, in_code(text)), (in_code(text), text)])))
    assert sorted(set(shown.found)) == ["code", "table", "tbody", "td", "th", "thead", "tr"]
    assert shown.found.count("td") == 4
    assert in_markdown(in_markdown(text)) == in_markdown(text)
    if text.isprintable() and "\\" not in text:
        assert page(in_markdown(text)).words.strip() == text.strip()


@pytest.mark.parametrize("text", NASTY)
def test_cards_and_reports_hold_no_tag_of_others(text: str) -> None:
    record = replace(provenance(), source=f"models/{text}", command=f"regraft prune {text}", source_fingerprint=text)
    plain = page(model_card(replace(record, source="m", command="c", source_fingerprint="f"), {"data": "x"}).partition("---\n\n")[2])
    card = page(model_card(record, {"data": text, text: 1}).partition("---\n\n")[2])
    assert sorted(set(card.found)) == sorted(set(plain.found))
    assert report(text) <= report("x")


def report(text: str) -> set[str]:
    """Returns the kinds of tags in the report of a run whose names and texts are the given one."""
    loss: dict[str, Any] = {"loss_nats": 1.0, "perplexity": 2.0, "bits_per_byte": 1.0, "tokens": 1, "bytes": 1, "documents": 1}
    loss |= {"text": text, "split": "test", "window_tokens": 8, "stride_tokens": 8, "bos": True, "unknown_share": 0.0}
    size = {"parameters": 1, "bytes_on_disk": 1, "bytes_in_memory": 1, "macs_per_token": 1, "context_tokens": 1}
    del loss["unknown_share"]
    measured = from_json(Measurement, to_json({"label": text, "loss": loss, "size": size}))
    made = RunReport(text, text, f"description: {text!r}", (measured,), prompt=text, samples={text: text}, facts={text: text})
    return set(page(to_markdown(made)).found)
