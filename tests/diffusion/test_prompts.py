import pytest

from qzo_diffusion.core.errors import DataError
from qzo_diffusion.diffusion.prompts import read_prompts


def write(tmp_path, data: bytes):
    path = tmp_path / "prompts.txt"
    path.write_bytes(data)
    return path


def test_comments_and_empty_lines_are_passed_over(tmp_path):
    path = write(tmp_path, b"# a comment\n\n  a cat \r\n  # another\na dog # not a comment\n")
    assert read_prompts(path) == ["a cat", "a dog # not a comment"]


def test_a_byte_order_mark_is_not_part_of_the_prompt(tmp_path):
    assert read_prompts(write(tmp_path, b"\xef\xbb\xbfa cat\n")) == ["a cat"]


def test_the_trigger_is_put_in(tmp_path):
    assert read_prompts(write(tmp_path, b"a cat, [trigger]\n"), "sks") == ["a cat, sks"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no prompt"),
        (b"# only this\n", "no prompt"),
        (b"a cat, [trigger]\n", "trigger"),
        (b"\xff\xfe\xfa", "can't be read"),
    ],
)
def test_files_without_usable_prompts_are_refused(tmp_path, data, message):
    with pytest.raises(DataError, match=message):
        read_prompts(write(tmp_path, data))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt"):
        read_prompts(tmp_path / "nowhere.txt")
