"""Text from outside (names of files and runs, captions, prompts) made harmless: one function for
each place where it is shown. HTML is escaped by the page's template, after `one_line`.
"""

import re
import unicodedata

# LINE/PARAGRAPH SEPARATOR end a line; a bidi override turns the text that follows it around
_HIDDEN = {0x061C, 0xFEFF, *range(0x200E, 0x2010), *range(0x2028, 0x202F), *range(0x2066, 0x206A)}
_KEPT = "\n\t"
_MARKDOWN = re.compile(r"[\\`*\[\]<>&|~#!${}@]|(?<![^\W_])_|_(?![^\W_])|://|\bwww\.")
# what begins a list, a rule or the line under a heading
_AT_THE_START = re.compile(r"^([-+]|\d+[.)])(?=\s|$)|^[-=](?=[-=\s]*$)")
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "|": "&#124;", "@": "&#64;"}
_LINKS = {"://": "&#58;//", "www.": "www&#46;"}


def terminal(text: str) -> str:
    """Text of several lines for a terminal: control characters, which could move the cursor or
    colour what follows, become escapes such as `\\x1b`.
    """
    return "".join(one if one in _KEPT else _visible(one) for one in text)


def one_line(text: str) -> str:
    """Escape a name inside a line: like `terminal`, but line ends and tabs become escapes, too."""
    return "".join(map(_visible, text))


def markdown(text: str) -> str:
    """Text that Markdown and HTML show as it is, on one line; also inside a table or a heading."""
    found = _MARKDOWN.sub(lambda match: _plain(match[0]), one_line(text))
    return _AT_THE_START.sub(lambda match: f"{match[0][:-1]}\\{match[0][-1]}", found)


def markdown_code(text: str) -> str:
    """Text as code inside a line or a table of Markdown."""
    found = one_line(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", found)), default=0))
    room = " " if found.startswith("`") or found.endswith("`") or not found else ""
    return f"{fence}{room}{found}{room}{fence}".replace("|", "\\|")


def _plain(mark: str) -> str:
    return _LINKS.get(mark) or _ENTITIES.get(mark) or f"\\{mark}"


def _visible(one: str) -> str:
    code = ord(one)
    if unicodedata.category(one) not in ("Cc", "Cs") and code not in _HIDDEN:
        return one
    short = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(one)
    return short or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")
