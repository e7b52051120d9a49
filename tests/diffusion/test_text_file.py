import codecs

import pytest

from qzo_diffusion.diffusion.text_file import decode, split_lines

TEXTS = ["a red house", "красный дом, зима", "一座红色的房子", "ein „rotes“ Haus – schön…"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
    ],
)
def test_marked_text_is_read(text: str, mark: bytes, encoding: str) -> None:
    found, name = decode(mark + text.encode(encoding))
    assert (found, name is None) == (text, encoding == "utf-8")


@pytest.mark.parametrize("text", [TEXTS[0], TEXTS[1], TEXTS[3], "a\n"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_read(text: str, encoding: str) -> None:
    assert decode(text.encode(encoding)) == (text, "UTF-16 without a mark")


def test_a_line_end_of_one_byte_behind_utf_16_does_no_harm() -> None:
    assert decode("a cat".encode("utf-16-le") + b"\n") == ("a cat", "UTF-16 without a mark")


@pytest.mark.parametrize("text", ["a “red” house", "it’s 5 € …", "café"])
def test_windows_quotation_marks_are_read(text: str) -> None:
    assert decode(text.encode("cp1252")) == (text, "Windows-1252")


def test_what_windows_has_not_is_latin() -> None:
    assert decode(b"\x81\xe9") == ("\x81é", "Latin-1")


def test_only_line_ends_end_a_line() -> None:
    text = "a\u2028b\r\nc\x85d\x0ce\x0bf\x1cg\rh\u2029i\n"
    assert split_lines(text) == ["a\u2028b", "c\x85d\x0ce\x0bf\x1cg", "h\u2029i", ""]


def test_a_stray_nul_leaves_a_text_in_utf_8():
    assert decode(b"red\x00 apple, water colour\n") == ("red\x00 apple, water colour\n", None)
    assert decode("süß\x00er Apfel".encode()) == ("süß\x00er Apfel", None)
