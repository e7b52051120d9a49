"""Captions from files beside images, from metadata and from a fallback; triggers and encodings."""

from pathlib import Path

import pytest

from qzo_diffusion.core.errors import DataError
from qzo_diffusion.diffusion.captions import Caption
from tests.diffusion.caption_files import images, metadata, read


def test_the_first_source_with_text_wins(tmp_path: Path) -> None:
    a, b, c, d = files = images(tmp_path, "a.png", "b.png", "c.png", "d.png")
    metadata(tmp_path, {"file_name": "a.png", "text": "from metadata"})
    for stem in "ab":
        (tmp_path / f"{stem}.txt").write_text("from txt")
    for stem in "abc":
        (tmp_path / f"{stem}.caption").write_text("from caption")
    assert read(tmp_path, files, fallback="from the flag").by_file == {
        a: Caption("from metadata", "metadata.jsonl"),
        b: Caption("from txt", "txt"),
        c: Caption("from caption", "caption"),
        d: Caption("from the flag", "--caption"),
    }


def test_some_images_may_lack_a_caption_but_not_all(tmp_path: Path) -> None:
    files = images(tmp_path, "a.png", "b.png")
    with pytest.raises(DataError, match="no captions") as caught:
        read(tmp_path, files)
    assert "--caption" in caught.value.remedy
    (tmp_path / "a.txt").write_text("a cat")
    assert read(tmp_path, files).by_file[files[1]] == Caption("", "none")


def test_an_empty_fallback_asks_for_training_without_text(tmp_path: Path) -> None:
    files = images(tmp_path, "a.png")
    assert read(tmp_path, files, fallback="").by_file[files[0]] == Caption("", "--caption")


def test_an_empty_caption_file_is_noted_and_the_next_source_taken(tmp_path: Path) -> None:
    files = images(tmp_path, "a.png")
    metadata(tmp_path, {"file_name": "a.png", "text": "  "})
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "a.caption").write_text("a cat\n")
    captions = read(tmp_path, files)
    assert captions.by_file[files[0]] == Caption("a cat", "caption")
    assert captions.notes == (
        "1 texts in metadata.jsonl are empty: a.png",
        "1 captions are empty: a.txt",
    )


def test_notes_of_one_kind_are_one_note(tmp_path: Path) -> None:
    files = images(tmp_path, *(f"{index:02}.png" for index in range(25)))
    for index, path in enumerate(files):
        path.with_suffix(".txt").write_bytes(b"" if index < 12 else b"caf\xe9")
    assert read(tmp_path, files).notes == (
        "12 captions are empty: "
        + ", ".join(f"{index:02}.txt" for index in range(10))
        + ", ... and 2 more",
        "13 caption files are not UTF-8, read as Windows-1252: "
        + ", ".join(f"{index}.txt" for index in range(12, 22))
        + ", ... and 3 more",
    )


def test_a_caption_file_of_two_images_counts_once(tmp_path: Path) -> None:
    files = images(tmp_path, "a.jpg", "a.png", "b.png")
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.txt").write_text("a cat")
    assert read(tmp_path, files).notes == ("1 captions are empty: a.txt",)


def test_a_caption_file_that_gives_way_to_one_of_the_same_name_is_noted(tmp_path: Path) -> None:
    files = images(tmp_path, "a.png")
    (tmp_path / "a.TXT").write_text("one")
    (tmp_path / "a.txt").write_text("two")
    captions = read(tmp_path, files)
    assert captions.by_file[files[0]].text == "one"
    assert captions.notes == ("1 caption files are not read: another has the same name: a.txt",)


@pytest.mark.parametrize(
    ("data", "notes"),
    [
        (
            "ein Kätzchen".encode("latin-1"),
            ("1 caption files are not UTF-8, read as Windows-1252: a.txt",),
        ),
        ("ein Kätzchen".encode("utf-8-sig"), ()),
        (
            "ein Kätzchen".encode("utf-16"),
            ("1 caption files are not UTF-8, read as UTF-16: a.txt",),
        ),
        ("ein Kätzchen".encode(), ()),
    ],
)
def test_encodings_of_a_caption_file(tmp_path: Path, data: bytes, notes: tuple[str, ...]) -> None:
    files = images(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes(data)
    captions = read(tmp_path, files)
    assert captions.by_file[files[0]].text == "ein Kätzchen"
    assert captions.notes == notes


def test_a_caption_of_ten_thousand_words_is_kept_whole(tmp_path: Path) -> None:
    files = images(tmp_path, "a.png")
    text = " ".join(f"word{index}" for index in range(10_000))
    (tmp_path / "a.txt").write_text(text)
    assert read(tmp_path, files).by_file[files[0]].text == text


def test_the_trigger_replaces_its_placeholder_in_every_source(tmp_path: Path) -> None:
    files = images(tmp_path, "a.png", "b.png", "c.png")
    metadata(tmp_path, {"file_name": "a.png", "text": "a cat, [trigger]"})
    (tmp_path / "b.txt").write_text("[trigger] of a [trigger]")
    captions = read(tmp_path, files, fallback="in [trigger] style", trigger="zqo")
    assert [caption.text for caption in captions.by_file.values()] == [
        "a cat, zqo",
        "zqo of a zqo",
        "in zqo style",
    ]
    with pytest.raises(DataError, match=r"\[trigger\].*no trigger") as caught:
        read(tmp_path, files, fallback="in [trigger] style")
    assert "--trigger" in caught.value.remedy


def test_a_trigger_that_is_used_nowhere_is_noted(tmp_path: Path) -> None:
    files = images(tmp_path, "a.png")
    assert read(tmp_path, files, fallback="a cat", trigger="zqo").notes == (
        "the trigger 'zqo' is used nowhere: no caption holds it or [trigger]",
    )


def test_caption_files_of_which_none_matches_are_an_error_that_names_them(tmp_path: Path) -> None:
    files = images(tmp_path, "a.png", "b.png", "texts/a.txt", "texts/b.txt")[:2]
    with pytest.raises(DataError, match=r"texts/a\.txt, texts/b\.txt"):
        read(tmp_path, files, fallback="a cat")


def test_caption_files_of_which_some_match_are_noted(tmp_path: Path) -> None:
    files = images(tmp_path, "a.png", "b.png")
    for name in ("a.txt", "c.txt", "README.txt"):
        (tmp_path / name).write_text("a cat")
    assert read(tmp_path, files).notes == ("1 caption files match no image: c.txt",)


def test_a_licence_is_no_caption(tmp_path: Path) -> None:
    files = images(tmp_path, "a.png", "LICENSE.txt")[:1]
    assert read(tmp_path, files, fallback="a cat").notes == ()


def test_names_with_dots_capitals_and_folders(tmp_path: Path) -> None:
    files = images(tmp_path, "a.b.PNG", "sub/a.png")
    (tmp_path / "a.b.TXT").write_text("one")
    (tmp_path / "sub/a.txt").write_text("two")
    assert [caption.text for caption in read(tmp_path, files).by_file.values()] == ["one", "two"]


@pytest.mark.parametrize("suffix", [".txt", ".caption"])
@pytest.mark.parametrize(
    ("image", "text"), [("cafe\u0301", "caf\u00e9"), ("caf\u00e9", "cafe\u0301")]
)
def test_a_caption_file_whose_name_is_composed_differently(
    tmp_path: Path, image: str, text: str, suffix: str
) -> None:
    files = images(tmp_path, f"{image}.png")
    (tmp_path / f"{text}{suffix}").write_text("a cat")
    captions = read(tmp_path, files)
    assert captions.by_file[files[0]] == Caption("a cat", suffix[1:])
    assert captions.notes == ()


def test_of_names_that_look_alike_the_same_bytes_come_first(tmp_path: Path) -> None:
    files = images(tmp_path, "cafe\u0301.png", "caf\u00e9.png")
    for path in files:
        path.with_suffix(".txt").write_text(str(len(path.stem)))
    assert [caption.text for caption in read(tmp_path, files).by_file.values()] == ["5", "4"]
    metadata(
        tmp_path, *({"file_name": path.name, "text": f"{len(path.stem)} letters"} for path in files)
    )
    assert [caption.text for caption in read(tmp_path, files).by_file.values()] == [
        "5 letters",
        "4 letters",
    ]


def test_a_caption_file_that_cannot_be_read_is_a_data_error(tmp_path: Path) -> None:
    files = images(tmp_path, "a.png")
    (tmp_path / "a.txt").symlink_to("nowhere.txt")
    with pytest.raises(DataError, match=r"cannot read .*a\.txt"):
        read(tmp_path, files)


def test_hidden_and_skipped_files_are_not_looked_at(tmp_path: Path) -> None:
    files = images(tmp_path, "a.png", ".hidden/b.txt", "._a.txt", "val/c.txt")[:1]
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "val/metadata.jsonl").write_text("broken")
    assert read(tmp_path, files, other=tmp_path / "val").notes == ()
