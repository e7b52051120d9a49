"""`train` with images, settings or places that do not fit: a message; no run is overwritten."""

import pytest
import torch

from qzo_diffusion.cli import main
from tests.conftest import failing, metrics


def test_images_without_captions_need_one(train, images, capsys):
    for file in images.glob("*.txt"):
        file.unlink()
    assert train("--max-steps", 1) == 2
    assert "--caption" in capsys.readouterr().err
    assert (
        train("--max-steps", 1, "--caption", "a picture in [trigger] style", "--trigger", "sks")
        == 0
    )


def test_one_bad_image_of_many_is_named_and_the_run_goes_on(train, images, tmp_path, capsys):
    (images / "broken.png").write_bytes((images / "0.png").read_bytes()[:40])
    assert train("--max-steps", 1) == 0
    assert "broken.png" in capsys.readouterr().err
    assert train("--max-steps", 1, "--strict", name="strict") == 2
    assert "broken.png" in capsys.readouterr().err
    assert not (tmp_path / "strict").exists()


def test_a_device_that_is_full_is_told_with_a_remedy(train, tmp_path, monkeypatch, capsys):
    """Sample grids are left out with a warning; a step that has no room ends the run."""
    from qzo_diffusion.diffusion.sampling import Sampler
    from qzo_diffusion.runs.style import plan

    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nMore")

    monkeypatch.setattr(Sampler, "images", full)
    assert train("--max-steps", 1, "sample.every=1", name="drawn") == 0
    assert "go on with sample.batch_size=1" in capsys.readouterr().err
    monkeypatch.setattr(plan, "model_loss", full)
    error = failing(capsys, train("--max-steps", 1))
    assert "Tried to allocate 20.00 MiB." in error
    assert "train.micro_batch_size" in error
    assert (tmp_path / "run/config.yaml").exists()


@pytest.mark.parametrize("content", ["missing", "empty", "text only", "file"])
def test_folders_that_cannot_be_trained_on(train, tmp_path, capsys, content):
    folder = tmp_path / "style"
    if content == "file":
        folder.write_text("")
    elif content != "missing":
        folder.mkdir()
        if content == "text only":
            (folder / "a.txt").write_text("a caption")
    failing(capsys, train("--max-steps", 1, style_dir=folder))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train.lrr=1"], ["did you mean 'train.lr'"]),
        (["train.lr=-1"], ["train.lr", "greater than 0"]),
        (["--max-steps", "many"], ["train.max_steps", "many"]),
        (["--preset", "nonsense"], ["paper"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--model", "nowhere/nothing"], ["hf download"]),
        (["compute.device=warp9"], ["compute.device"]),
        (["--sample-prompts", "nowhere.txt"], ["nowhere.txt"]),
        (["--validation-dir", "nowhere"], ["nowhere"]),
        (["quant.blocksize=48"], ["quant.blocksize"]),
        (["quant.blocksize=4096"], ["4096"]),
    ],
)
def test_bad_arguments_are_told_with_a_remedy(train, capsys, arguments, words):
    error = failing(capsys, train("--max-steps", 1, *arguments))
    assert all(word in error for word in words)


def test_an_existing_run_is_not_touched(train, tmp_path, capsys):
    assert train("--max-steps", 1) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert "never overwritten" in failing(capsys, train("--max-steps", 1))
    assert before == {
        path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()
    }


def test_a_place_that_cannot_be_written(train, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    failing(capsys, train("--max-steps", 1, name="file/run"))


def test_a_cache_that_cannot_be_written(train, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    failing(capsys, train("--max-steps", 1, f"data.cache_dir={tmp_path / 'file' / 'cache'}"))


def test_a_loss_that_stays_nan_stops_the_run_with_everything_saved(
    train, tmp_path, capsys, monkeypatch
):
    from qzo_diffusion.runs.style import plan as style_run

    def spoiled(*arguments):
        return torch.full((4,), float("nan"))

    monkeypatch.setattr(style_run, "model_loss", spoiled)
    error = failing(capsys, train("--max-steps", 50, "qzo.regions=1"))
    assert "10 steps in a row" in error
    run = tmp_path / "run"
    assert sum(line["skipped"] for line in metrics(run) if "skipped" in line) == 10
    assert (run / "checkpoints/step_000010/COMPLETE").exists()


def test_style_dir_is_needed(capsys):
    assert "--style-dir" in failing(capsys, main(["train", "--model", "tiny"]))


def test_a_model_folder_with_pickles_only(train, tmp_path, capsys):
    import shutil

    from qzo_diffusion.resources import tiny_model

    model = shutil.copytree(tiny_model(), tmp_path / "model")
    for file in (model / "transformer").glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    assert "pickles" in failing(capsys, train("--max-steps", 1, "--model", model))


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ("qzo.layers=[nowhere]", "no such layer"),
        ("qzo.per_example=true qzo.parametrization=dense", "per_example"),
    ],
)
def test_bad_choices_of_numbers(train, capsys, setting, word):
    assert word in failing(capsys, train("--max-steps", 1, *setting.split()))
