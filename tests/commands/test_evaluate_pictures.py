"""`evaluate --images`: any folder of pictures, and the prompts that belong to them."""

import json

import pytest
from PIL import Image

from qzo_diffusion.cli import main
from qzo_diffusion.runs.style import scoring as score_run
from tests.conftest import failing, write_squares


@pytest.mark.parametrize("wanted", ["file/scores.json", "."])
def test_where_scores_of_pictures_go_is_looked_at_before_anything_is_opened(
    pictures, tmp_path, monkeypatch, capsys, wanted
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(score_run, "open_image", None)
    error = failing(
        capsys, score(pictures, "--prompts", tmp_path / "three.txt", "--output", tmp_path / wanted)
    )
    assert "choose another --output" in error


@pytest.fixture
def pictures(tmp_path):
    folder = write_squares(tmp_path / "pictures", ("red", "green", "blue"))
    (tmp_path / "three.txt").write_text("red apple\nfrog, noto style\nblue heart\n")
    return folder


def score(pictures, *arguments):
    return main(
        ["evaluate", "--images", str(pictures), "--scorer", "embedded", *map(str, arguments)]
    )


def test_any_folder_of_pictures_can_be_scored(pictures, tmp_path, images, capsys):
    output = tmp_path / "scores.json"
    assert (
        score(
            pictures,
            "--prompts",
            tmp_path / "three.txt",
            "--style-dir",
            images,
            "--output",
            output,
            "--json",
        )
        == 0
    )
    found = json.loads(output.read_text())
    assert found == json.loads(capsys.readouterr().out)
    assert found["clip_score"]["n"] == 3
    assert [row["content"] for row in found["images"]] == ["red apple", "frog", "blue heart"]
    assert found["style"]["n_style"] == 6
    assert found["unusable"] == []


def test_what_sample_left_needs_no_prompts(tmp_path, prompts, capsys):
    folder = tmp_path / "out"
    main(["sample", "--model", "tiny", "--prompts", str(prompts), "--output-dir", str(folder)])
    capsys.readouterr()
    assert score(folder / "samples", "--json") == 0
    assert [row["file"] for row in json.loads(capsys.readouterr().out)["images"]] == [
        "000.png",
        "001.png",
    ]
    # grid.png beside them is no picture of a prompt
    assert score(folder / "samples", "--prompts", prompts) == 0


def test_pictures_are_paired_in_the_order_of_their_numbers(tmp_path, capsys):
    folder = tmp_path / "many"
    names = ["s1/p_9.png", "s1/P_10.png", "s2/p_1.png", "s10/p_1.png"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(folder / name)
    (tmp_path / "p.txt").write_text("".join(f"thing {index}\n" for index in range(4)))
    assert score(folder, "--prompts", tmp_path / "p.txt", "--json") == 0
    captured = capsys.readouterr()
    pairs = [(row["file"], row["prompt"]) for row in json.loads(captured.out)["images"]]
    assert pairs == [(name, f"thing {index}") for index, name in enumerate(names)]
    assert "s1/p_9.png <- thing 0\n  s1/P_10.png <- thing 1" in captured.err


def test_how_prompts_were_read_is_told(pictures, tmp_path, capsys):
    text = "red “apple” --w 512\nfrog\nblue heart --d 3\n"
    (tmp_path / "windows.txt").write_bytes(text.encode("cp1252"))
    assert score(pictures, "--prompts", tmp_path / "windows.txt", "--json") == 0
    captured = capsys.readouterr()
    prompts = [row["prompt"] for row in json.loads(captured.out)["images"]]
    assert prompts == ["red “apple”", "frog", "blue heart"]
    assert "is not UTF-8" in captured.err
    assert "options behind prompts are left out: --w (line 1" in captured.err
    assert "--d (line 3" in captured.err


def test_an_order_that_nobody_can_mistake_is_not_told(pictures, tmp_path, capsys):
    assert score(pictures, "--prompts", tmp_path / "three.txt") == 0
    error = capsys.readouterr().err
    assert "the first pairs" not in error
    assert "Content score" in error
    assert "CLIP score" not in error


def test_a_corrupt_picture_is_named_and_counted(pictures, tmp_path, capsys):
    (pictures / "1.png").write_bytes((pictures / "1.png").read_bytes()[:50])
    assert score(pictures, "--prompts", tmp_path / "three.txt", "--json") == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert [row["prompt"] for row in found["images"]] == ["red apple", "blue heart"]
    assert found["unusable"][0]["file"] == "1.png"
    assert "1.png is left out" in captured.err


def test_one_picture_is_scored_with_a_warning(pictures, tmp_path, capsys):
    for name in ("1.png", "2.png"):
        (pictures / name).unlink()
    (tmp_path / "one.txt").write_text("red apple\n")
    assert score(pictures, "--prompts", tmp_path / "one.txt", "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["clip_score"]["ci95"] is None
    assert "one picture has no interval" in captured.err


@pytest.mark.parametrize(
    "case",
    [
        "too few prompts",
        "no prompts",
        "empty folder",
        "no folder",
        "all corrupt",
        "unknown scorer",
        "table",
    ],
)
def test_bad_input_is_told_and_costs_nothing(pictures, tmp_path, capsys, case):
    prompts, folder, more = tmp_path / "three.txt", pictures, []
    if case == "too few prompts":
        prompts.write_text("red apple\n")
    if case == "empty folder":
        folder = tmp_path / "empty"
        folder.mkdir()
    if case == "no folder":
        folder = tmp_path / "nowhere"
    if case == "all corrupt":
        for file in pictures.iterdir():
            file.write_bytes(b"no picture")
    if case == "table":
        (pictures / "prompts.json").write_text('[{"file": "../../etc/passwd", "prompt": "a"}]')
    if case == "unknown scorer":
        more = ["--scorer", "ViT-Z/nothing"]
    if case not in ("no prompts", "table"):
        more += ["--prompts", prompts]
    failing(capsys, score(folder, *more))
