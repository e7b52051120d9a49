"""Captions of metadata.jsonl: of one folder, and of a validation folder inside or beside it."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qzo_diffusion.core.errors import DataError
from qzo_diffusion.diffusion.captions import Caption
from tests.diffusion.caption_files import images, metadata, read


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
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
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
