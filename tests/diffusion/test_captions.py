import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qzo_diffusion.core.errors import DataError
from qzo_diffusion.diffusion.captions import Caption, Captions, read_captions


def images(folder: Path, *names: str) -> list[Path]:
    """Empty files: captions go by name, and what the images hold is not looked at."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return [folder / name for name in names]


def read(
    folder: Path,
    files: list[Path],
    fallback: str | None = None,
    trigger: str | None = None,
    other: Path | None = None,
) -> Captions:
    return read_captions(folder, files, fallback=fallback, trigger=trigger, other=other)


def metadata(folder: Path, *entries: object) -> None:
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


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


def test_metadata_names_are_relative_to_its_own_folder(tmp_path: Path) -> None:
    files = images(tmp_path, "a.png", "sub/a.png", "sub/b.png")
    metadata(
        tmp_path,
        {"file_name": "a.png", "text": "one"},
        {"file_name": "./sub/../sub/b.png", "text": "three"},
    )
    metadata(tmp_path / "sub", {"file_name": "a.png", "text": "two"})
    assert [caption.text for caption in read(tmp_path, files).by_file.values()] == [
        "one",
        "two",
        "three",
    ]


def test_metadata_may_hold_a_byte_order_mark_windows_lines_and_a_name_composed_differently(
    tmp_path: Path,
) -> None:
    decomposed, composed = "cafe\u0301.png", "caf\u00e9.png"
    files = images(tmp_path, decomposed)
    line = json.dumps({"file_name": composed, "text": "a\u2028b"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_bytes(f"{line}\r\n\r\n".encode("utf-8-sig"))
    assert read(tmp_path, files).by_file[files[0]].text == "a\u2028b"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"file_name": "missing.png", "text": "x"}, "not among the images"),
        ({"file_name": "metadata.jsonl", "text": "x"}, "not among the images"),
        ({"file_name": "a.png", "text": "x"}, "has a caption already"),
        ({"file_name": "./a.png", "text": "x"}, "has a caption already"),
        ({"file_name": "../a.png", "text": "x"}, "leads out"),
        ({"file_name": "sub/../../a.png", "text": "x"}, "leads out"),
        ({"file_name": "/etc/passwd", "text": "x"}, "leads out"),
        ({"file_name": "C:\\a.png", "text": "x"}, "leads out"),
        ({"file_name": "folder/../../outside.png", "text": "x"}, "leads out"),
        ({"file_name": "folder/outside.png", "text": "x"}, "not among the images"),
        ({"file_name": "b.png"}, 'no key "text"'),
        ({"text": "x"}, 'no key "file_name"'),
        ({"file_name": "b.png", "text": 7}, "not a string"),
        ({"file_name": ["b.png"], "text": "x"}, "not a string"),
        ({"file_name": "b.png", "text": "\ud800"}, "surrogate"),
        ('{"file_name": "b.png", "text": "x"', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('["b.png", "x"]', "not an object"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_line_of_metadata_is_an_error_with_its_number(
    tmp_path: Path, line: object, problem: str
) -> None:
    folder = tmp_path / "imgs"
    files = images(folder, "a.png", "b.png")
    images(tmp_path, "outside.png")
    (folder / "folder").symlink_to(tmp_path)
    metadata(folder, {"file_name": "a.png", "text": "fine"}, "", line)
    with pytest.raises(DataError, match=problem) as caught:
        read(folder, files)
    assert "metadata.jsonl, line 3:" in caught.value.got


def test_metadata_may_name_images_that_are_links(tmp_path: Path) -> None:
    # As "hf download" lays a data set out.
    folder = tmp_path / "snapshots/main"
    folder.mkdir(parents=True)
    images(tmp_path, "blobs/0123")
    metadata(tmp_path / "blobs", {"file_name": "a.png", "text": "a cat"})
    (folder / "a.png").symlink_to("../../blobs/0123")
    (folder / "metadata.jsonl").symlink_to("../../blobs/metadata.jsonl")
    files = [folder / "a.png"]
    assert read(folder, files).by_file == {files[0]: Caption("a cat", "metadata.jsonl")}


@pytest.mark.parametrize(
    "spelling", ["imgs/val", "imgs/../imgs/val", "link/val", "imgs/link", "elsewhere"]
)
def test_one_metadata_for_a_folder_and_the_validation_folder_inside(
    tmp_path: Path, spelling: str
) -> None:
    folder, val = tmp_path / "imgs", tmp_path / spelling
    (train,) = images(folder, "a.png")
    if spelling in ("imgs/link", "elsewhere"):
        # the folder may be a link, which a resumed run knows by its other end
        images(tmp_path, "elsewhere/a.png", "elsewhere/sub/b.png")
        (folder / "link").symlink_to(tmp_path / "elsewhere")
    else:
        images(tmp_path, "imgs/val/a.png", "imgs/val/sub/b.png")
        (tmp_path / "link").symlink_to(folder)
    name = "link" if (folder / "link").exists() else "val"
    held_out = [val / "a.png", val / "sub/b.png"]
    metadata(
        folder,
        {"file_name": "a.png", "text": "trained on"},
        {"file_name": f"{name}/a.png", "text": "one"},
        {"file_name": f"{name}/sub/b.png", "text": "two"},
    )
    captions = read(folder, [train], other=val)
    assert captions.by_file == {train: Caption("trained on", "metadata.jsonl")}
    assert captions.notes == (
        f"2 lines of metadata.jsonl are for images in {val}: {name}/a.png, {name}/sub/b.png",
    )
    captions = read(val, held_out, other=folder)
    assert [caption.text for caption in captions.by_file.values()] == ["one", "two"]
    assert captions.notes == ()


def test_a_validation_folder_reads_its_own_metadata_first(tmp_path: Path) -> None:
    files = images(tmp_path, "val/a.png", "val/b.png")
    metadata(tmp_path, *({"file_name": f"val/{stem}.png", "text": "outer"} for stem in "ab"))
    metadata(tmp_path / "val", {"file_name": "a.png", "text": "its own"})
    assert [
        caption.text for caption in read(tmp_path / "val", files, other=tmp_path).by_file.values()
    ] == ["its own", "outer"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"file_name": "val/missing.png", "text": "x"}, "not among the images"),
        ({"file_name": "val/sub/missing.png", "text": "x"}, "not among the images"),
        ({"file_name": "val/a.png", "text": "x"}, "has a caption already"),
        ({"file_name": "val/../../val/a.png", "text": "x"}, "leads out"),
    ],
)
def test_a_wrong_line_for_the_validation_folder_is_an_error(
    tmp_path: Path, line: object, problem: str
) -> None:
    folder = tmp_path / "imgs"
    files = images(folder, "val/a.png")
    metadata(folder, {"file_name": "val/a.png", "text": "fine"}, line)
    with pytest.raises(DataError, match=problem) as caught:
        read(folder / "val", files, other=folder)
    assert "metadata.jsonl, line 2:" in caught.value.got


@pytest.mark.parametrize("name", ["missing.png", "valley/a.png", "sub/\0/a.png", "\ud800/a.png"])
def test_lines_for_no_image_are_no_lines_for_the_validation_folder(
    tmp_path: Path, name: str
) -> None:
    files = images(tmp_path, "a.png", "val/a.png")[:1]
    metadata(tmp_path, {"file_name": name, "text": "x"})
    with pytest.raises(DataError, match="not among the images"):
        read(tmp_path, files, other=tmp_path / "val")


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


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from(["a.png", "b.png", "../a.png", "/a.png", "\0", "x" * 5000]) | st.text()
entries = st.fixed_dictionaries(
    {}, optional={"file_name": names | json_values, "text": st.text() | json_values}
)
any_lines = st.lists(
    st.binary(max_size=40)
    | st.one_of(entries, json_values).map(lambda value: json.dumps(value).encode()),
    max_size=6,
)


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(lines=any_lines)
def test_whatever_metadata_holds_the_answer_is_captions_or_a_data_error(
    tmp_path: Path, lines: list[bytes]
) -> None:
    files = images(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.jsonl").write_bytes(b"\n".join(lines))
    try:
        captions = read(tmp_path, files, fallback="x", trigger="zqo")
    except DataError as error:
        assert "metadata.jsonl, line" in error.got  # noqa: PT017  # success is allowed too
    else:
        assert list(captions.by_file) == files
        assert all(
            caption.source in ("metadata.jsonl", "--caption")
            for caption in captions.by_file.values()
        )


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
