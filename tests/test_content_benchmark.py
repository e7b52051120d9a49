"""The content benchmark: folders, cells by name, the distance of pictures, and honest figures."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.content import folders, table, vgg
from benchmarks.content.__main__ import methods_of, wanted
from benchmarks.content.cells import Cell, side_by_side
from benchmarks.content.methods import DEFAULT, METHODS, changed, merged
from qzo_diffusion.config.files import make_config


@pytest.fixture
def emoji(tmp_path):
    """Drawings of one style: 24 of the small folder, and 210 other concepts."""
    names = [*folders.SMALL_NAMES, *(f"thing {index}" for index in range(210))]
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 255, (len(names), 64, 64, 3), np.uint8)
    known = np.ones(len(names), bool)
    np.savez(tmp_path / "emoji64.npz", img_twemoji=pixels, ok_twemoji=known)
    (tmp_path / "meta.json").write_text(json.dumps([{"name": name} for name in names]))
    return tmp_path, names, pixels


def test_the_small_folder_has_24_drawings_with_plain_captions(emoji, tmp_path):
    data, names, pixels = emoji
    found = folders.style_folder(folders.SMALL, data, tmp_path / "work", names)
    assert len(list(found.held_out.glob("*.png"))) == len(folders.SMALL_HELD_OUT)
    for name in set(folders.SMALL_NAMES) - set(folders.SMALL_HELD_OUT):
        stem = found.train / name.replace(" ", "_")
        assert stem.with_suffix(".txt").read_text() == name
        assert np.array_equal(Image.open(stem.with_suffix(".png")), pixels[names.index(name)])
    assert len(list(found.train.iterdir())) == 40
    assert not set(found.concepts) & set(folders.SMALL_NAMES)
    assert list(found.captions) == list(found.concepts)


def test_drawings_are_compared_with_concepts_that_were_not_trained_on(emoji, tmp_path):
    data, names, pixels = emoji
    found = folders.style_folder("twemoji", data, tmp_path / "work", names)
    lines = (found.train / "metadata.jsonl").read_text().splitlines()
    trained = {json.loads(line)["text"] for line in lines}
    assert len(trained) == 64
    assert len(set(found.concepts)) == folders.CONCEPTS
    for concept, caption, drawing in zip(
        found.concepts, found.captions, found.drawings, strict=True
    ):
        assert caption == f"{concept}, twemoji style"
        assert caption not in trained
        assert np.array_equal(drawing, pixels[names.index(concept)])


def test_concepts_that_the_model_does_not_draw_are_left_out(emoji, tmp_path):
    data, names, _ = emoji
    with pytest.raises(ValueError, match="190 different drawings"):
        folders.style_folder("twemoji", data, tmp_path / "work", names[:190])
    with pytest.raises(ValueError, match="no folder 'noto'; there are twemoji24, "):
        folders.style_folder("noto", data, tmp_path / "work", names)


def test_cells_are_chosen_by_name():
    found = wanted(METHODS, "twemoji24/default_*,*/first_order_600_1", [300, 600], [0, 1])
    names = [cell.name for cell in found]
    assert names[:2] == ["twemoji24/default_300_0", "twemoji24/default_600_0"]
    assert "twemoji/first_order_600_1" in names
    assert len(names) == 4 + 4
    assert list(wanted(METHODS, "nothing", [300], [0])) == []


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_settings_that_exist(name):
    make_config(merged(METHODS[name], {"model": "tiny", "train": {"max_steps": 300}}))


def test_further_methods_are_the_default_with_changes(tmp_path):
    file = tmp_path / "more.json"
    file.write_text(json.dumps({"slow": {"train": {"lr": 0.01}}}))
    assert methods_of(file)["slow"] == changed(DEFAULT, train__lr=0.01)
    assert DEFAULT["train"]["lr"] == 0.1


@pytest.fixture
def distance(monkeypatch):
    """Two stages of one convolution each, which copy the channels; the heads weigh 1 and 2."""
    monkeypatch.setattr(vgg, "STAGES", ((3,), (3,)))
    kernel = np.zeros((3, 3, 3, 3), np.float32)
    kernel[1, 1] = np.eye(3)
    convolution = {"kernel": kernel, "bias": np.zeros(3, np.float32)}
    heads = {
        f"NetLinLayer_{index}": {"Conv_0": {"kernel": np.full((1, 1, 3, 1), index + 1.0)}}
        for index in range(2)
    }
    trunk = {"VGG16_0": {"Conv_0": convolution, "Conv_1": convolution}}
    return vgg.PictureDistance(trunk | heads)


def test_the_distance_is_the_formula(distance):
    """Pictures of one colour: the channels at every place, of unit length, squared difference."""
    red, white = (Image.new("RGB", (64, 64), colour) for colour in ("red", "white"))
    units = []
    for colour in ((1.0, -1.0, -1.0), (1.0, 1.0, 1.0)):
        x = (torch.tensor(colour) - torch.tensor(vgg.SHIFT)) / torch.tensor(vgg.SCALE)
        units.append(x.relu() / x.relu().norm())
    expected = 3 * float((units[0] - units[1]).square().sum())
    assert distance([red, red], [white, red]) == pytest.approx([expected, 0.0], rel=1e-5)


def test_weights_that_are_more_than_arrays_are_refused(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(pickle.dumps({"VGG16_0": print}))
    with pytest.raises(pickle.UnpicklingError, match="print in a file of weights"):
        vgg.PictureDistance.load(path)


def test_pictures_lie_side_by_side_in_blocks():
    base, tuned = ([Image.new("RGB", (128, 128), colour)] * 8 for colour in ("red", "blue"))
    sheet = side_by_side(base, tuned)
    assert sheet.size == (8 * 128, 2 * 128 + 16)
    assert [sheet.getpixel((64 + 128 * at, 100)) for at in (0, 1)] == [(255, 0, 0), (0, 0, 255)]


def result(folder, method, seed=0, *, loss=0.8, content=0.5, delta=-0.01, **more):
    return {
        "cell": Cell(folder, method, 300, seed).name,
        "folder": folder,
        "method": method,
        "steps": 300,
        "seed": seed,
        "loss": {"start": 1.0, "final": loss},
        "content": {"base": 0.7, "tuned": content},
        "style": {"base": 0.1, "tuned": 0.2},
        "kid": {"base": 0.05, "tuned": 0.1},
        "verdict": "No verdict on style.",
        "signal": {"cosine": 0.025, "expected": 0.024},
        "drawing": {"delta": delta, "delta_ci95": [delta - 0.01, delta + 0.01]},
        "seconds": {"train": 60.0, "judge": 40.0},
    } | more


def test_figures_are_means_over_seeds_and_ratios_to_the_old_default():
    own = [
        result(folder, "new", seed, content=0.6 + 0.02 * seed)
        for folder in folders.FOLDERS
        for seed in range(3)
    ]
    old = [result(folder, "default", content=0.5, loss=0.75) for folder in folders.STYLES]
    found = table.figures(own + old, "new")
    assert found["twemoji24"]["content"] == pytest.approx(0.62)
    assert found["twemoji24"]["seeds"]["content"] == pytest.approx([0.6, 0.62, 0.64])
    style = found["styles"]["fluent3d"]
    assert style["content_lost_ratio"] == pytest.approx(0.08 / 0.2)
    assert style["loss_ratio"] == pytest.approx(0.8 / 0.75)
    assert style["drawing_delta"] == pytest.approx(-0.01)
    assert style["drawing_delta_ci95"] == pytest.approx([-0.02, 0.0])
    assert found["expected_cosine_ok"] is True


def test_a_cosine_far_from_the_expected_one_is_not_ok():
    far = [
        result(folder, "default", signal={"cosine": 0.03, "expected": 0.124})
        for folder in folders.FOLDERS
    ]
    assert table.figures(far, "default")["expected_cosine_ok"] is False


def test_missing_cells_are_named():
    with pytest.raises(ValueError, match=r"no cell twemoji24/new; .* --cells 'twemoji24/new_\*'"):
        table.figures([result("twemoji", "new")], "new")


def test_the_table_has_a_line_for_each_cell():
    lines = table.table([result("twemoji24", "default")]).splitlines()
    assert len(lines) == 2
    assert lines[1].split()[:3] == ["twemoji24/default_300_0", "0.800", "1.000"]
    assert "-0.020 to +0.000" in lines[1]
