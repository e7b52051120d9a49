import hashlib
import json
import shutil
from pathlib import Path

import pytest

from qzo_diffusion.core.errors import ConfigError, DataError
from qzo_diffusion.diffusion.style_folder import (
    StyleFolder,
    dataset_table,
    read_style_folder,
    summary,
)
from tests.diffusion.image_files import save, save_bomb, save_many, save_truncated


def read(folder: Path, **options: object) -> StyleFolder:
    return read_style_folder(folder, **{"resolution": 64, **options})  # type: ignore[arg-type]


def test_an_image_becomes_a_sample(tmp_path: Path) -> None:
    path = save(tmp_path / "sub/a.png", size=(200, 100))
    path.with_suffix(".txt").write_text("a [trigger] cat\n")
    (sample,) = read(tmp_path, trigger="zqo", repeats=3).samples
    assert (sample.id, sample.path) == ("sub/a.png", path)
    assert sample.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (sample.caption, sample.caption_source) == ("a zqo cat", "txt")
    assert (sample.width, sample.height) == (96, 48)
    assert (sample.notes, sample.split, sample.repeats) == ((), "train", 3)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        read(tmp_path / "missing")


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a file"):
        read(save(tmp_path / "a.png"))


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no files"):
        read(tmp_path)


def test_a_folder_of_text_only(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "b.MP4").touch()
    with pytest.raises(DataError, match=r"only other files \(1 \.txt, 1 \.mp4\)"):
        read(tmp_path)


def test_a_folder_of_pictures_of_a_format_that_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "other.txt").write_text("a cat")
    with pytest.raises(
        DataError, match=r"none of the 1 images .*a\.HEIC: \.heic is a format that is not read"
    ) as caught:
        read(tmp_path)
    assert "PNG or JPEG" in caught.value.remedy


def test_pictures_of_a_format_that_is_not_read_are_bad_images(tmp_path: Path) -> None:
    save_many(tmp_path, 1)
    save(tmp_path / "a.jpg").rename(tmp_path / "downloaded.jfif")
    for index in range(3):
        (tmp_path / f"IMG_{index}.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
        (tmp_path / f"IMG_{index}.txt").write_text("a dog")
    result = read(tmp_path)
    assert [sample.id for sample in result.samples] == ["000.png", "downloaded.jfif"]
    line = (
        "  IMG_0.HEIC, IMG_1.HEIC, IMG_2.HEIC: .heic is a format that is not read; convert it to "
        "PNG or JPEG"
    )
    assert line in summary(result).splitlines()
    assert not any("not used" in note or "no image:" in note for note in result.notes)
    with pytest.raises(DataError, match=r"3 unusable images: IMG_0\.HEIC"):
        read(tmp_path, strict=True)


def test_images_without_a_caption_are_named(tmp_path: Path) -> None:
    save_many(tmp_path, 2)
    save(tmp_path / "lost.png")
    (tmp_path / "bad.png").touch()
    assert "1 images have no caption: lost.png" in read(tmp_path).notes
    assert not any("no caption" in note for note in read(tmp_path, caption="a cat").notes)


def test_notes_on_files_copies_and_the_split_come_first_and_none_is_cut(tmp_path: Path) -> None:
    for path in save_many(tmp_path, 24)[:12]:
        path.with_suffix(".txt").write_text("")
        shutil.copy(path, path.with_name(f"{path.stem}copy.png"))
    (tmp_path / "film.mp4").touch()
    (tmp_path / "lost.txt").write_text("a dog")
    copies = ", ".join(f"{index:03}.png = {index:03}copy.png" for index in range(10))
    bare = ", ".join(f"{index:03}.png, {index:03}copy.png" for index in range(5))
    empty = ", ".join(f"{index:03}.txt" for index in range(10))
    result = read(tmp_path)
    assert result.notes == [
        "1 other files were not used: 1 .mp4",
        f"12 images are there more than once: {copies}, ... and 2 more",
        "4 of 24 different images are held out for the validation loss",
        f"24 images have no caption: {bare}, ... and 14 more",
        "1 caption files match no image: lost.txt",
        f"12 captions are empty: {empty}, ... and 2 more",
    ]
    assert summary(result).splitlines()[-6:] == [f"note      {note}" for note in result.notes]


def test_many_bad_files_of_one_kind_hide_no_other_kind(tmp_path: Path) -> None:
    save_many(tmp_path, 1)
    for index in range(12):
        save(tmp_path / f"icon{index:02}.png", size=(index + 1, 8))
    save_truncated(tmp_path / "z.png")
    lines = summary(read(tmp_path)).splitlines()
    assert any(
        line.startswith("  12 too small: icon00.png (too small: 1x8 pixels") for line in lines
    )
    assert any(line.startswith("  z.png: damaged") for line in lines)
    with pytest.raises(DataError, match=r"13 unusable images: 12 too small: .*; z\.png: damaged"):
        read(tmp_path, strict=True)


def test_a_folder_of_bad_images_only(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    save_truncated(tmp_path / "b.png")
    with pytest.raises(
        DataError, match=r"none of the 2 images .*a\.png: an empty file.*b\.png: damaged"
    ):
        read(tmp_path, caption="a cat")


def test_one_bad_image_of_many_is_named_and_the_run_goes_on(tmp_path: Path) -> None:
    save_many(tmp_path, 3)
    save_bomb(tmp_path / "bomb.png")
    result = read(tmp_path)
    assert len(result.samples) == 3
    ((name, reason),) = result.bad
    assert name == "bomb.png"
    assert "too large" in reason
    assert "bomb.png: too large" in summary(result)
    with pytest.raises(DataError, match=r"1 unusable images: bomb\.png"):
        read(tmp_path, strict=True)


def test_strict_is_silent_when_all_is_well(tmp_path: Path) -> None:
    save_many(tmp_path, 2)
    assert len(read(tmp_path, strict=True).samples) == 2


def test_the_caption_of_a_bad_image_does_not_hide_that_the_others_have_none(tmp_path: Path) -> None:
    save_many(tmp_path, 2, text=None)
    (tmp_path / "bad.png").touch()
    (tmp_path / "bad.txt").write_text("a cat")
    with pytest.raises(DataError, match="no captions"):
        read(tmp_path)


def test_other_files_are_counted_and_hidden_ones_are_not(tmp_path: Path) -> None:
    save_many(tmp_path / "imgs", 1)
    for name in ("a.mp4", "b.mp4", "notes", ".DS_Store"):
        (tmp_path / "imgs" / name).touch()
    save(tmp_path / "imgs/.thumbs/a.png")
    save(tmp_path / "elsewhere/a.png")
    (tmp_path / "imgs/more").symlink_to(tmp_path / "elsewhere")
    result = read(tmp_path / "imgs")
    assert [sample.id for sample in result.samples] == ["000.png"]
    assert "4 other files were not used: 2 .mp4, 1 links to folders, 1 no extension" in result.notes


def test_a_link_to_an_image_is_an_image(tmp_path: Path) -> None:
    path = save(tmp_path / "elsewhere/a.png")
    (tmp_path / "imgs").mkdir()
    (tmp_path / "imgs/b.png").symlink_to(path)
    assert [sample.id for sample in read(tmp_path / "imgs", caption="a cat").samples] == ["b.png"]


@pytest.mark.parametrize(
    ("count", "held_out"), [(1, 0), (19, 0), (20, 4), (40, 4), (59, 5), (330, 32)]
)
def test_how_many_are_held_out(tmp_path: Path, count: int, held_out: int) -> None:
    save_many(tmp_path, count, text=None)
    result = read(tmp_path, caption="a cat", repeats=2)
    assert (len(result.train), len(result.validation)) == (count - held_out, held_out)
    assert {sample.repeats for sample in result.validation} <= {1}
    (remark,) = (note for note in result.notes if "held out" in note)
    assert remark.startswith(f"{held_out} of {count}" if held_out else "no image is held out")


def test_what_is_held_out_depends_on_bytes_and_seed_not_on_names(tmp_path: Path) -> None:
    save_many(tmp_path / "one", 30, text=None)
    for index, path in enumerate(sorted((tmp_path / "one").iterdir())):
        (tmp_path / "two").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "two" / f"{(index * 7) % 30}.png")

    def held_out(name: str, seed: int) -> set[str]:
        return {
            sample.sha256 for sample in read(tmp_path / name, caption="a cat", seed=seed).validation
        }

    assert held_out("one", 0) == held_out("two", 0) == held_out("one", 0)
    assert held_out("one", 0) != held_out("one", 1)


def test_copies_of_an_image_stay_on_one_side(tmp_path: Path) -> None:
    for path in save_many(tmp_path, 20, text=None):
        shutil.copy(path, path.with_name(f"copy{path.name}"))
    result = read(tmp_path, caption="a cat")
    assert (len(result.train), len(result.validation)) == (32, 8)
    assert not {s.sha256 for s in result.train} & {s.sha256 for s in result.validation}
    names = ", ".join(f"{index:03}.png = copy{index:03}.png" for index in range(10))
    assert f"20 images are there more than once: {names}, ... and 10 more" in result.notes


def test_twenty_copies_of_one_image_hold_out_nothing(tmp_path: Path) -> None:
    for index in range(20):
        save(tmp_path / f"{index}.png")
    assert len(read(tmp_path, caption="a cat").train) == 20


@pytest.mark.parametrize("place", ["beside", "imgs/held", "imgs/.held"])
def test_a_validation_folder(tmp_path: Path, place: str) -> None:
    save_many(tmp_path / "imgs", 25)
    save(tmp_path / place / "000.png", colour=(250, 1, 1))
    (tmp_path / place / "metadata.jsonl").write_text('{"file_name": "000.png", "text": "held out"}')
    (tmp_path / place / "bad.png").touch()
    result = read(tmp_path / "imgs", validation_dir=tmp_path / place, repeats=5)
    assert len(result.train) == 25
    (sample,) = result.validation
    assert (sample.id, sample.caption, sample.repeats) == ("validation:000.png", "held out", 1)
    assert result.bad == [("validation:bad.png", "an empty file (0 bytes)")]
    assert len({sample.id for sample in result.samples}) == 26


def test_training_on_a_sub_folder_of_the_validation_folder(tmp_path: Path) -> None:
    save_many(tmp_path / "all/train", 2)
    save_many(tmp_path / "all", 3)
    result = read(tmp_path / "all/train", validation_dir=tmp_path / "all")
    assert (len(result.train), len(result.validation)) == (2, 3)
    assert any(note.startswith("2 validation images are also trained on") for note in result.notes)


@pytest.mark.parametrize(("train", "held_out"), [("imgs", "imgs/val"), ("imgs/train", "imgs")])
def test_one_metadata_for_both_folders(tmp_path: Path, train: str, held_out: str) -> None:
    inner = tmp_path / (held_out if train == "imgs" else train)
    save(tmp_path / "imgs/a.png", colour=(1, 1, 1))
    save(inner / "b.png", colour=(2, 2, 2))
    lines = [
        {"file_name": "a.png", "text": "outer"},
        {"file_name": f"{inner.name}/b.png", "text": "inner"},
    ]
    (tmp_path / "imgs/metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = read(tmp_path / train, validation_dir=tmp_path / held_out)
    assert {sample.path.name: sample.caption for sample in result.samples} == {
        "a.png": "outer",
        "b.png": "inner",
    }
    assert {sample.caption_source for sample in result.samples} == {"metadata.jsonl"}


def test_the_same_folder_for_training_and_validation(tmp_path: Path) -> None:
    save_many(tmp_path, 2)
    with pytest.raises(DataError, match="for training and for validation"):
        read(tmp_path, validation_dir=tmp_path / "." / "../" / tmp_path.name)


def test_a_validation_folder_that_is_not_there(tmp_path: Path) -> None:
    save_many(tmp_path, 2)
    with pytest.raises(DataError, match="there is no folder"):
        read(tmp_path, validation_dir=tmp_path / "missing")


def test_repeats_below_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="repeats"):
        read(tmp_path, repeats=0)


def test_a_name_that_is_not_utf_8_gets_an_id_that_can_be_written(tmp_path: Path) -> None:
    save(tmp_path / "caf\udce9.png")
    (sample,) = read(tmp_path, caption="a cat").samples
    assert sample.id == "caf\\xe9.png"


def test_the_table_for_dataset_json(tmp_path: Path) -> None:
    save_many(tmp_path, 2)
    result = read(tmp_path)
    first, second = dataset_table(result, {"000.png": (5, False)})
    assert first == {
        "file": "000.png",
        "sha256": result.samples[0].sha256,
        "caption": "a cat",
        "caption_source": "txt",
        "bucket": "64x64",
        "split": "train",
        "repeats": 1,
        "tokens": 5,
        "truncated": False,
        "mask": "none",
        "notes": [],
    }
    assert (second["tokens"], second["truncated"]) == (None, None)


def test_the_summary_counts_everything(tmp_path: Path) -> None:
    save_many(tmp_path, 20)
    save(tmp_path / "wide.gif", size=(96, 48))
    (tmp_path / "lost.txt").write_text("a dog")
    (tmp_path / "bad.jpg").write_text("no image")
    text = summary(read(tmp_path))
    assert text.splitlines() == [
        "images    21: 17 train, 4 held out",
        "captions  20 txt, 1 none",
        "buckets   20 64x64, 1 96x48",
        "changed   1: 1 converted from palette",
        "unusable  1",
        "  bad.jpg: not an image, by its content",
        "note      4 of 21 different images are held out for the validation loss",
        "note      1 images have no caption: wide.gif",
        "note      1 caption files match no image: lost.txt",
    ]


def test_the_summary_of_many_bad_files_stays_short(tmp_path: Path) -> None:
    save_many(tmp_path, 1)
    for index in range(50):
        (tmp_path / f"bad{index:02}.png").touch()
    lines = summary(read(tmp_path)).splitlines()
    assert "unusable  50" in lines
    assert any(
        line.endswith("bad09.png, ... and 40 more: an empty file (0 bytes)") for line in lines
    )
    assert len(lines) < 20


def test_large_crops_and_enlargements_are_noted_with_how_much(tmp_path: Path) -> None:
    save(tmp_path / "panorama.png", size=(2000, 100))
    save(tmp_path / "tower.png", size=(100, 1500), colour=(9, 9, 9))
    save(tmp_path / "small.png", size=(20, 20))
    save(tmp_path / "normal.png", size=(512, 400))
    result = read(tmp_path, caption="x", resolution=176)
    rows = {row["file"]: row["notes"] for row in dataset_table(result)}
    assert rows == {
        "panorama.png": ["90% of it cut off"],
        "tower.png": ["87% of it cut off"],
        "small.png": ["enlarged 8.8 times"],
        "normal.png": [],
    }
    assert "2 images lose more than a third to the crop: panorama.png (90%), tower.png (87%)" in (
        result.notes
    )
    assert "1 images are enlarged more than twice: small.png (8.8)" in result.notes
    assert "changed" not in summary(result)


def test_a_third_and_twice_are_not_much(tmp_path: Path) -> None:
    save(tmp_path / "a.png", size=(32, 32))
    save(tmp_path / "b.png", size=(192, 64))
    assert all(not sample.notes_on_shape for sample in read(tmp_path, caption="x").samples)


@pytest.mark.parametrize("name", ["10_ink style", "deep/3_paper", "5_a b/sub"])
def test_folders_named_as_kohya_does_are_noted(tmp_path: Path, name: str) -> None:
    save_many(tmp_path / name, 2)
    (note,) = [note for note in read(tmp_path).notes if "repeats" in note]
    assert name.removesuffix("/sub") in note
    assert "data.repeats" in note


@pytest.mark.parametrize("name", ["ink_10", "10ink", "_10_x"])
def test_other_numbers_in_names_of_folders_are_no_repeats(tmp_path: Path, name: str) -> None:
    save_many(tmp_path / name, 2)
    assert not any("repeats" in note for note in read(tmp_path).notes)
