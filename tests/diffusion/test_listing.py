import json
import os
from pathlib import Path

import pytest

from qzo_diffusion.core.errors import DataError
from qzo_diffusion.diffusion.captions import read_captions
from qzo_diffusion.diffusion.listing import list_files
from qzo_diffusion.diffusion.style_folder import StyleFolder, read_style_folder
from qzo_diffusion.train.run_folder import write_folder
from tests.diffusion.image_files import save, save_many


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")


def names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in list_files(folder).files]


def read(folder: Path, **options: object) -> StyleFolder:
    return read_style_folder(folder, resolution=64, caption="x", **options)  # type: ignore[arg-type]


def table(path: Path, **row: object) -> None:
    path.write_text(json.dumps([{"prompt": "a cat", **row}]))


def make_run(folder: Path) -> None:
    touch(folder, "config.yaml", "environment.json", "samples/step_000000.png")


def make_stopped_run(folder: Path) -> None:
    touch(folder, "journal.qzo", "samples/step_000000.png")


def make_samples(folder: Path) -> None:
    touch(folder, "samples/000.png", "samples/grid.png")
    table(folder / "samples/prompts.json", file="000.png")


def make_grids(folder: Path) -> None:
    touch(folder, "grid.png", "step_000000.png", "step_000100.png")


def make_mix(folder: Path) -> None:
    write_folder(folder / "final", lambda aside: touch(aside, "scales.safetensors"))
    touch(folder, "config.yaml", "preview.png")


def make_export(folder: Path) -> None:
    write_folder(folder, lambda aside: touch(aside, "README.md", "samples.png"))


def make_evaluation(folder: Path) -> None:
    def write(aside: Path) -> None:
        touch(aside, "000.png", "key.json")
        table(aside / "prompts.json", file="000.png")

    write_folder(folder / "evaluation/tuned", write)


@pytest.mark.parametrize(
    "make",
    [
        make_run,
        make_stopped_run,
        make_samples,
        make_grids,
        make_mix,
        make_export,
        make_evaluation,
    ],
)
@pytest.mark.parametrize("place", ["outputs/a", "b", "cats/c"])
def test_outputs_of_the_program_are_no_data(tmp_path: Path, make, place: str) -> None:
    save_many(tmp_path / "cats", 2)
    before = read(tmp_path)
    make(tmp_path / place)
    after = read(tmp_path)
    assert [sample.id for sample in after.samples] == [sample.id for sample in before.samples]
    (note,) = set(after.notes) - set(before.notes)
    assert note.startswith("1 outputs of this program are no data: ")
    assert place in note


def test_outputs_below_a_validation_folder_are_no_data(tmp_path: Path) -> None:
    save_many(tmp_path / "imgs", 2)
    save(tmp_path / "held/a.png", colour=(9, 9, 9))
    make_run(tmp_path / "held/run")
    result = read(tmp_path / "imgs", validation_dir=tmp_path / "held")
    assert [sample.id for sample in result.validation] == ["validation:a.png"]
    assert "validation: 1 outputs of this program are no data: run" in result.notes


def test_samples_can_be_named_as_data_without_their_grid(tmp_path: Path) -> None:
    save_many(tmp_path, 2, text=None)
    save(tmp_path / "grid.png", colour=(9, 9, 9))
    table(tmp_path / "prompts.json", file="000.png")
    assert [sample.id for sample in read(tmp_path).samples] == ["000.png", "001.png"]


def test_loose_pictures_among_outputs_are_no_data_unless_captioned(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "outputs/plot.png")
    assert names(tmp_path) == ["a.png"]
    touch(tmp_path, "outputs/plot.txt")
    assert names(tmp_path) == ["a.png", "outputs/plot.png", "outputs/plot.txt"]


@pytest.mark.parametrize(
    "entries",
    [
        ["config.yaml", "a.png"],
        ["prompts.json", "a.png"],
        ["samples/a.png"],
        ["grid.png", "a.png"],
        ["report.html", "a.png"],
    ],
)
def test_a_folder_of_the_user_is_not_mistaken_for_an_output(
    tmp_path: Path, entries: list[str]
) -> None:
    touch(tmp_path / "mine", *entries)
    assert names(tmp_path) == sorted(f"mine/{entry}" for entry in entries)


def test_everything_is_listed_for_pictures_that_are_scored(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    assert len(list_files(tmp_path, own_outputs=True).files) == 3


@pytest.mark.parametrize(
    "left",
    [
        "@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg",
        "__MACOSX/._a.png",
        "._a.png",
        "a-masklabel.png",
        "a-condlabel.PNG",
        "lonely-masklabel.png",
        "a_mask.png",
        "A_MASK.PNG",
        "a.png_mask.png",
        "a-mask.jpg",
        "mask_a.png",
        "a_thumb.jpg",
        "a-150x150.png",
        "masks/a.png",
        "Masks/other.png",
        "train_masks/b.gif",
        ".thumbnails/a.png",
        "thumbs/a.png",
        "Catalog Previews.lrdata/a.jpg",
        "#recycle/b.png",
        "Thumbs.db",
        ".DS_Store",
        "desktop.ini",
    ],
)
def test_what_other_programs_left_is_no_data(tmp_path: Path, left: str) -> None:
    touch(tmp_path, "a.png", "a.txt", left)
    assert names(tmp_path) == ["a.png", "a.txt"]


@pytest.mark.parametrize(
    "name",
    [
        "b_mask.png",
        "unmask.png",
        "mask.png",
        "masked_ball.png",
        "gas_mask.png",
        "photo-1920x1080.png",
        "eaDir/c.png",
    ],
)
def test_a_picture_of_that_name_alone_is_data(tmp_path: Path, name: str) -> None:
    touch(tmp_path, "a.png", name)
    assert name in names(tmp_path)


def test_masks_with_captions_are_data_unless_they_belong_to_pictures(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "masks/venice.png", "masks/venice.txt")
    assert "masks/venice.png" in names(tmp_path)
    touch(tmp_path, "masks/a.png")
    assert names(tmp_path) == ["a.png"]


def test_there_is_one_note_on_other_programs(tmp_path: Path) -> None:
    save_many(tmp_path, 2)
    for name in ("000-masklabel.png", "001_mask.png", "@eaDir/000.png/THUMB.jpg"):
        save(tmp_path / name)
    touch(tmp_path, "000-masklabel.txt", "Thumbs.db")
    result = read(tmp_path)
    assert [sample.id for sample in result.samples] == ["000.png", "001.png"]
    assert [note for note in result.notes if "program" in note or "not used" in note] == [
        "left by other programs and no data: 3 masks (000-masklabel.png, 000-masklabel.txt, "
        "001_mask.png); 2 thumbnails (@eaDir, Thumbs.db)"
    ]


def test_a_folder_of_masks_only_says_so(tmp_path: Path) -> None:
    touch(tmp_path, "masks/a.png")
    with pytest.raises(DataError, match=r"holds no files; left by other programs.*masks"):
        read(tmp_path)


def test_lines_of_metadata_for_masks_are_passed_over(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "masks/a.png", "a_mask.png")
    lines = [{"file_name": name, "text": "x"} for name in ("a.png", "masks/a.png", "a_mask.png")]
    (tmp_path / "METADATA.JSONL").write_text("\n".join(map(json.dumps, lines)))
    captions = read_captions(tmp_path, [tmp_path / "a.png"], fallback=None, trigger=None)
    assert captions.by_file[tmp_path / "a.png"].text == "x"
    assert captions.notes == (
        "2 lines of metadata.jsonl are for files that are no data: masks/a.png, a_mask.png",
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable to root")
def test_a_folder_of_the_system_need_not_be_readable(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    (tmp_path / "lost+found").mkdir(mode=0)
    assert names(tmp_path) == ["a.png"]
