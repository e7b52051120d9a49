"""Data of the convergence benchmark: the choice of drawings, styles, and folders of one's own."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.convergence import folder, methods, pictures, settings
from benchmarks.convergence.cells import run_cell
from benchmarks.convergence.methods import (
    FAMILIES,
)
from benchmarks.convergence.settings import Cell
from benchmarks.convergence.tasks import (
    STYLE_WORDS,
    choose,
    open_style,
    stratified_sigmas,
    write_images,
)
from benchmarks.tiny.drawings import taught_concepts
from tests.benchmarks.small_task import SmallTask, folders, small


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    """The archive with ten taught concepts, one of them drawn as another one, and two unknown
    ones.
    """
    folder = tmp_path_factory.mktemp("drawings")
    names = ["not taught", *taught_concepts()[:10], "nor this"]
    pixels = np.random.Generator(np.random.Philox(0)).integers(
        0, 256, (12, 64, 64, 3), dtype=np.uint8
    )
    pixels[4] = pixels[3]
    np.savez(folder / "emoji64.npz", img_openmoji=pixels, ok_openmoji=np.arange(12) != 5)
    (folder / "meta.json").write_text(json.dumps([{"name": name} for name in names]))
    return folder


def test_the_choice_of_drawings_is_fixed_and_disjoint(drawings):
    train, held_out = choose("openmoji", drawings, train=3, held_out=5)
    again = choose("openmoji", drawings, train=3, held_out=5)
    assert (train.names, held_out.names) == (again[0].names, again[1].names)
    assert torch.equal(train.images, again[0].images)
    assert len(train) == 3
    assert len(held_out) == 5
    both = train.names + held_out.names
    assert len(set(both)) == 8
    assert set(both) <= set(taught_concepts())
    assert taught_concepts()[4] not in both  # ok_openmoji is False
    assert len({image.numpy().tobytes() for image in [*train.images, *held_out.images]}) == 8
    assert train.captions[0] == f"{train.names[0]}, {STYLE_WORDS['openmoji']}"
    with pytest.raises(ValueError, match="9 are needed"):
        choose("openmoji", drawings, train=4, held_out=5)


def test_images_are_written_once(drawings, tmp_path):
    train, held_out = choose("openmoji", drawings, train=3, held_out=5)
    folder = write_images(tmp_path, train)
    assert len(list(folder.glob("*.png"))) == 3
    assert [
        json.loads(line)["text"] for line in (folder / "metadata.jsonl").read_text().splitlines()
    ] == train.captions
    assert write_images(tmp_path, train) == folder
    assert write_images(tmp_path, held_out) != folder


def test_noise_levels_cover_all_slices():
    sigmas = stratified_sigmas(4, 0)
    assert sorted(sigmas.tolist()) == [0.125, 0.375, 0.625, 0.875]
    assert torch.equal(sigmas, stratified_sigmas(4, 0))


@pytest.mark.usefixtures("small_tiny")
def test_a_style_is_trained_and_drawn(drawings, tmp_path, monkeypatch):
    task = open_style("openmoji", drawings, tmp_path, train=3, held_out=5)
    assert sum(map(len, task.held_out)) == 5
    batches = [task.batches(seed, 2, 4, "uniform")(0).micro_batches[0] for seed in (0, 0, 1)]
    assert torch.equal(batches[0].noise, batches[1].noise)
    assert not torch.equal(batches[0].noise, batches[2].noise)
    result = run_cell(small("row_cosine", -2, steps=2), task, folders(tmp_path))
    assert [spent for spent, _ in result["curve"]] == [0, 4, 8]
    before = {name: live.clone() for name, live in task.scales.tensors().items()}
    monkeypatch.setattr(pictures, "COUNT", 2)
    both = {
        "tuned": small("default", -1, steps=2),
        "first order": small("first_order_dense", -3, steps=2),
    }
    target, checkpoints = tmp_path / "styles.png", tmp_path / "runs"
    assert not pictures.draw(task, both, checkpoints, target, lambda: True)
    assert not target.exists()
    assert pictures.draw(task, both, checkpoints, target, lambda: False)
    drawn = Image.open(target)
    assert (
        len(
            {
                drawn.crop((128 * column, 16, 128 * column + 128, 144)).tobytes()
                for column in range(4)
            }
        )
        == 4
    )
    assert all(torch.equal(live, before[name]) for name, live in task.scales.tensors().items())
    monkeypatch.setattr(
        pictures.CellRun, "advance", lambda *_: pytest.fail("trained what is in a checkpoint")
    )
    assert pictures.draw(task, both, checkpoints, tmp_path / "again.png", lambda: False)
    assert Image.open(tmp_path / "again.png").tobytes() == drawn.tobytes()


def test_the_best_finished_runs_of_a_style_are_drawn(tmp_path):
    def finish(family, exponent, seed, loss):
        cell = Cell("openmoji", FAMILIES[family].at(exponent), seed)
        path = tmp_path / f"{cell.name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            json.dumps(
                {
                    "cell": cell.name,
                    "data": cell.data,
                    "settings": cell.method.settings(),
                    "final_loss": loss,
                }
            )
        )
        return cell

    finish("first_order_dense", -3, 0, 0.9)
    assert pictures.best_cells("openmoji", tmp_path) == {}
    finish("default", methods.DEFAULT_EXPONENT, 0, 1.2)
    short = finish("default", methods.DEFAULT_EXPONENT, 1, 1.1)
    exact = finish("first_order_dense", -2, 0, 0.8)
    assert pictures.best_cells("openmoji", tmp_path) == {"tuned": short, "first order": exact}
    longest = finish("default_longest", methods.default_exponent(settings.LONGEST_BUDGET), 0, 1.15)
    assert pictures.best_cells("openmoji", tmp_path)["tuned"] == longest
    assert pictures.best_cells("fluent3d", tmp_path) == {}


def test_a_folder_of_ones_own_is_compared_and_goes_on_where_it_was(tmp_path, monkeypatch):
    opened, ran = [], []
    original = folder.run_cell
    monkeypatch.setattr(
        folder, "StyleTask", lambda *arguments: opened.append(arguments) or SmallTask()
    )
    monkeypatch.setattr(
        folder,
        "run_cell",
        lambda cell, *rest, **options: ran.append(cell.name) or original(cell, *rest, **options),
    )
    monkeypatch.setattr(methods, "FIRST_ORDER_STEPS", 5)
    first = folder.compare(tmp_path / "mine", 4 * 32, 2, tmp_path / "work", tmp_path / "cache")
    assert first["start"]["mine"] > first["default"]["mine"] > 0
    assert first["gain_share"]["mine"] > 0
    assert {f"mine/default_lr0.1_{seed}" for seed in (0, 1)} <= first["curves"].keys()
    # of 4 * 32
    assert all(
        curve[-1][0] == 3 * 16 + 2 * 32
        for name, curve in first["curves"].items()
        if "default" in name
    )
    before = len(ran)
    again = folder.compare(tmp_path / "mine", 4 * 32, 2, tmp_path / "work", tmp_path / "cache")
    assert len(ran) == before
    assert again["default"] == first["default"]
