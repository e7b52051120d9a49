import pytest

from qzo_diffusion.core.errors import DataError
from qzo_diffusion.diffusion.prompts import parse_prompts, read_prompt_file


def write(tmp_path, data: bytes):
    path = tmp_path / "prompts.txt"
    path.write_bytes(data)
    return path


def test_comments_and_empty_lines_are_passed_over(tmp_path):
    path = write(tmp_path, b"# a comment\n\n  a cat \r\n  # another\na dog # not a comment\n")
    assert read_prompt_file(path).texts == ["a cat", "a dog # not a comment"]


def test_a_byte_order_mark_is_not_part_of_the_prompt(tmp_path):
    assert read_prompt_file(write(tmp_path, b"\xef\xbb\xbfa cat\n")).texts == ["a cat"]


def test_the_trigger_is_put_in(tmp_path):
    found = read_prompt_file(write(tmp_path, b"a cat, [trigger] --n no [trigger]\n"), "sks")
    assert (found.texts, found.negatives) == (["a cat, sks"], ["no sks"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no prompt"),
        (b"# only this\n", "no prompt"),
        (b"a cat, [trigger]\n", r"line 1: 'a cat, \[trigger\]'"),
        (b"\xff\xfe\xfa", "can't be read"),
        (b"\x89PNG\r\n\x1a\n\0\0\0", "can't be read"),
        (b"a cat\n --n blue\n", "line 2: no prompt before '--n blue'"),
    ],
)
def test_files_without_usable_prompts_are_refused(tmp_path, data, message):
    with pytest.raises(DataError, match=message):
        read_prompt_file(write(tmp_path, data), None)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt"):
        read_prompt_file(tmp_path / "nowhere.txt")


def test_only_line_ends_end_a_prompt(tmp_path):
    text = "a\u2028b\nc\x85d\re\x0cf\r\ng\u2029h\n"
    assert read_prompt_file(write(tmp_path, text.encode())).texts == [
        "a\u2028b",
        "c\x85d",
        "e\x0cf",
        "g\u2029h",
    ]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "cp1252"])
def test_other_encodings_are_read_with_a_note(tmp_path, encoding):
    found = read_prompt_file(write(tmp_path, "a “red” café\n".encode(encoding)))
    assert found.texts == ["a “red” café"]
    assert "is not UTF-8, read as" in found.notes[0]


def test_the_negative_prompt_of_a_line_is_understood(tmp_path):
    data = b"red apple --n blue, --blurry --w 512 --d 42\nplain\nempty --n\n"
    found = read_prompt_file(write(tmp_path, data))
    assert found.texts == ["red apple", "plain", "empty"]
    assert [prompt.negative for prompt in found.prompts] == ["blue, --blurry", None, ""]
    assert found.prompts[0].row == {"prompt": "red apple", "negative_prompt": "blue, --blurry"}
    assert found.prompts[1].row == {"prompt": "plain"}


def test_other_options_are_left_out_with_one_note(tmp_path):
    data = b"a cat --w 512 --h 640 --d 7\na dog --l 7.5 --s 30 --d 8\n"
    found = read_prompt_file(write(tmp_path, data))
    assert found.texts == ["a cat", "a dog"]
    assert found.notes == [
        "options behind prompts are left out: --w (line 1; data.resolution sets it), "
        "--h (line 1; data.resolution sets it), --d (line 1, line 2; sample.seed sets it), "
        "--l (line 2; sample.guidance sets it), --s (line 2; sample.steps sets it)"
    ]


@pytest.mark.parametrize("text", ["a well--known cat", "a cat -- n", "cat --sketch", "50--50"])
def test_dashes_in_a_prompt_are_text(text):
    found = parse_prompts([("here", text)], None)
    assert (found.texts, found.notes) == ([text], [])


def test_half_a_pair_is_refused():
    with pytest.raises(DataError, match=r"--prompt 1: 'a \\ud83d' holds half"):
        parse_prompts([("--prompt 1", "a \ud83d")], None)
