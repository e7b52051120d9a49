"""Text from outside, as terminals and Markdown show it."""

import html
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qzo_diffusion.system import console, escape

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202e\u2066\ud800-\udfff]")


@given(st.text(st.characters(codec=None)))
def test_no_control_character_reaches_a_terminal(text):
    assert not CONTROL.search(escape.terminal(text))
    assert not re.search(r"[\n\t]", escape.one_line(text))
    escape.one_line(text).encode()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("a\nremedy: b\r", "a\\nremedy: b\\r"),
        ("gnp.\u202eexe", "gnp.\\u202eexe"),
        ("\x9b31m", "\\x9b31m"),
        ("名前 é 👩\u200d🚀", "名前 é 👩\u200d🚀"),
    ],
)
def test_names_in_a_line(text, shown):
    assert escape.one_line(text) == shown
    assert escape.terminal("two\nlines") == "two\nlines"


@pytest.mark.parametrize(
    "text",
    [
        "# x\n\n<script>alert(1)</script>",
        "![x](https://example.com/x.png)",
        "a | b | c",
        "**bold** _em_ `code` ~~out~~",
        "- item",
        "1. item",
        "www.example.com, a@example.com",
        "&lt;script&gt;",
        "[a]: https://example.com",
        "$x$ {{ y }}",
    ],
)
def test_markdown_shows_text_as_it_is(text):
    shown = escape.markdown(text)
    assert "<" not in shown
    assert not re.search(r"(?<!\\)[`*\[\]|]|://|www\.|^\s*(-|\d+\.) |\n", shown)
    back = html.unescape(re.sub(r"\\([^\w\s]|_)", r"\1", shown))
    assert back == escape.one_line(text)


def test_names_as_people_write_them_stay_readable():
    assert escape.markdown("2026-11-29-my_ink, step 3.5") == "2026-11-29-my_ink, step 3.5"


@pytest.mark.parametrize(
    ("text", "code"),
    [("a", "`a`"), ("a`b", "``a`b``"), ("`", "`` ` ``"), ("a|b\nc", "`a\\|b\\nc`")],
)
def test_markdown_code(text, code):
    assert escape.markdown_code(text) == code


def test_messages_and_results_hold_no_control_characters(capsys):
    for write in (console.report, console.show):
        write("done: \x1b[31mred\u202e\nnext line")
    shown = capsys.readouterr()
    assert shown.out == shown.err == "done: \\x1b[31mred\\u202e\nnext line\n"


def test_results_are_strict_json(capsys):
    found = {"loss": float("nan"), "rows": [(1.0, float("-inf"))], "name": "nan"}
    console.emit(found, True, "")
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "loss": None,
        "rows": [[1.0, None]],
        "name": "nan",
    }
