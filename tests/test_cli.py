"""Whole runs of the command line in this process, as a user would type them, on the embedded
model.
"""

import json
import os
import signal
import threading

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from qzo_diffusion.cli import main
from qzo_diffusion.config.files import read_yaml
from qzo_diffusion.core.journal import read_journal
from qzo_diffusion.diffusion.sampling import cells, load_picture
from qzo_diffusion.resources import shipped
from qzo_diffusion.runs.tuned import load_scales
from tests.conftest import FAST, failing, metrics


def test_a_run_leaves_what_the_contract_names(train, tmp_path, capsys):
    assert (
        train(
            "--model",
            "tiny",
            "--max-steps",
            3,
            "--json",
            "sample.every=2",
            "--validation-dir",
            tmp_path / "imgs2",
            *copy_images(tmp_path),
        )
        == 0
    )
    run = tmp_path / "run"
    results = json.loads(capsys.readouterr().out)
    assert results["steps"] == 3
    assert set(results["validation_loss"]) == {"start", "end"}
    expected = [
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "dataset.json",
        "final/scales.safetensors",
        "final/COMPLETE",
    ]
    expected += [
        f"samples/{name}.png" for name in ("step_000000", "step_000002", "step_000003", "grid")
    ]
    assert [name for name in expected if not (run / name).exists()] == []
    steps = [line for line in metrics(run, seconds=True) if "loss" in line]
    names = (
        "step loss_plus loss_minus loss directional_derivative projected_grad lr eps clipped "
        "sigma_mean seconds"
    )
    assert set(names.split()) <= set(steps[0])
    assert [line["step"] for line in steps] == [0, 1, 2]
    assert [line["step"] for line in metrics(run) if "validation_loss" in line] == [0, 3]
    table = json.loads((run / "dataset.json").read_text())
    assert len(table) == 12
    assert table[0]["caption"] == "square 0"
    assert table[0]["tokens"] > 0
    assert table[0]["truncated"] is False
    environment = json.loads((run / "environment.json").read_text())
    assert environment["model"] == "tiny"
    assert environment["packages"]["torch"] == torch.__version__.partition("+")[0]


def copy_images(tmp_path):
    """A validation folder; no further arguments."""
    folder = tmp_path / "imgs2"
    folder.mkdir()
    for index in range(6):
        Image.new("RGB", (64, 64), (0, 40 * index, 0)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"leaf {index}")
    return []


@pytest.mark.parametrize(
    "settings",
    [[], ["qzo.parametrization=dense", "train.optimizer=adam"], ["qzo.num_directions=2"]],
)
def test_the_same_command_twice_is_bit_identical(train, tmp_path, settings):
    assert (
        train("--max-steps", 3, *settings, name="a")
        == train("--max-steps", 3, *settings, name="b")
        == 0
    )
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    first, second = load_scales(tmp_path / "a")[0], load_scales(tmp_path / "b")[0]
    assert all(torch.equal(first[name], second[name]) for name in first)
    for picture in ("step_000000.png", "step_000003.png", "grid.png"):
        assert (tmp_path / "a/samples" / picture).read_bytes() == (
            tmp_path / "b/samples" / picture
        ).read_bytes()


def test_the_config_that_a_run_wrote_repeats_it(train, tmp_path, images):
    assert train("--max-steps", 2, "train.lr=0.01", name="a") == 0
    again = main(
        ["train", "--config", str(tmp_path / "a/config.yaml"), "--output-dir", str(tmp_path / "b")]
    )
    assert again == 0
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


def test_training_changes_the_scales_and_samples(train, tmp_path):
    assert train("--max-steps", 3, "train.lr=0.05") == 0
    run = tmp_path / "run"
    assert (run / "samples/step_000000.png").read_bytes() != (
        run / "samples/step_000003.png"
    ).read_bytes()


@pytest.mark.parametrize("preset", ["paper", "tiny", "default"])
def test_presets_run_with_their_settings(train, tmp_path, preset):
    assert train("--preset", preset, "--max-steps", 1) == 0
    resolved = read_yaml(tmp_path / "run/config.yaml")
    given = {option.partition("=")[0] for option in FAST} | {"train.max_steps", "model"}
    checked = 0
    for section, settings in read_yaml(shipped("configs") / f"{preset}.yaml").items():
        for name, value in settings.items() if isinstance(settings, dict) else ():
            if f"{section}.{name}" not in given:
                assert resolved[section][name] == value, (section, name)
                checked += 1
    assert checked or preset != "paper"  # the others only name a model
    (step,) = read_journal(tmp_path / "run/journal.qzo").steps
    assert step.eps == resolved["qzo"]["eps"]


def test_bfloat16_gives_the_losses_of_fp32_within_its_rounding(train, tmp_path):
    assert train("--max-steps", 1, "compute.dtype=bfloat16", name="rounded") == 0
    assert train("--max-steps", 1, name="exact") == 0
    assert json.loads((tmp_path / "rounded/environment.json").read_text())["dtype"] == "bfloat16"
    rounded, exact = (metrics(tmp_path / name)[0]["loss"] for name in ("rounded", "exact"))
    # 2 blocks with 7 products in a row and some around them, each output rounded by at most 2^-9
    # of its size, independently: three times √30 of that, and twice since the loss is a square
    assert rounded == pytest.approx(exact, rel=2 * 3 * 30**0.5 * 2**-9)
    assert rounded != exact


def test_backends_see_the_same_losses(train, tmp_path):
    """The same codes and scales in fp32: only the order of a product's sum differs."""
    assert (
        train("--max-steps", 1, "quant.backend=reference", name="a")
        == train("--max-steps", 1, name="b")
        == 0
    )
    first, second = metrics(tmp_path / "a")[0], metrics(tmp_path / "b")[0]
    assert first["loss_plus"] == pytest.approx(second["loss_plus"], rel=1e-5)


@pytest.mark.parametrize("method", ["quzo", "fo-scales"])
def test_other_methods_leave_a_run_that_is_sampled_evaluated_and_exported(
    train, tmp_path, prompts, capsys, method
):
    assert train("--method", method, "--max-steps", 3, "train.validate_every=1") == 0
    run = tmp_path / "run"
    assert (run / "journal.qzo").exists() == (method == "quzo")
    tuned = load_file(run / "final" / "scales.safetensors")
    assert {tensor.dtype for tensor in tuned.values()} == {
        torch.int8 if method == "quzo" else torch.float32
    }
    sample = ["sample", "--run", str(run), "--prompts", str(prompts), "--output-dir"]
    assert main([*sample, str(tmp_path / "tuned")]) == 0
    last = max((run / "samples").glob("step_*.png"))
    first = Image.open(tmp_path / "tuned" / "samples" / "000.png")
    shown = cells(load_picture(last), 2)[0]
    assert first.tobytes() == shown.resize(first.size, Image.Resampling.NEAREST).tobytes()
    assert (
        main(
            [
                "export",
                "--run",
                str(run),
                "--format",
                "bf16",
                "--output-dir",
                str(tmp_path / "exported"),
            ]
        )
        == 0
    )
    if method == "quzo":
        capsys.readouterr()
        assert "integer codes" in failing(
            capsys, main([*sample, str(tmp_path / "half"), "--strength", "0.5"])
        )
        again = tmp_path / "again"
        assert (
            main(["replay", "--journal", str(run / "journal.qzo"), "--output-dir", str(again)]) == 0
        )
        replayed = load_file(again / "final" / "scales.safetensors")
        assert all(torch.equal(tensor, replayed[name]) for name, tensor in tuned.items())


def test_configs_of_either_kind_are_validated(tmp_path, capsys):
    assert main(["validate", "--config", "sd35_large_8gb.yaml"]) == 0
    capsys.readouterr()
    path = tmp_path / "config.yaml"
    path.write_text("task: sst2\nobjective: accuracy\n")
    assert main(["validate", "--config", str(path)]) == 0
    assert "objective: accuracy" in capsys.readouterr().out
    path.write_text("objective: accuracy\ncaption: a\n")
    error = failing(capsys, main(["validate", "--config", str(path)]))
    assert "unknown setting 'caption'" in error


def test_the_schedule_and_the_number_of_steps_set_the_rate(train, capsys):
    assert train("--max-steps", 500, "--dry-run") == 0
    assert "lr: 0.1\n" in capsys.readouterr().out
    assert train("--max-steps", 500, "--dry-run", "train.schedule=cosine") == 0
    assert "lr: 0.08\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ([], "3 images, 8 directions of each: 24 forward passes"),
        (
            ["qzo.num_directions=1"],
            "3 images, 1 direction of each, at both sides: 6 forward passes",
        ),
        (
            ["qzo.per_example=false", "qzo.num_directions=2"],
            "3 images, 2 directions that all share, at both sides: 12 forward passes",
        ),
    ],
)
def test_a_dry_run_tells_what_a_step_costs(train, capsys, settings, told):
    assert train("--dry-run", "data.batch_size=3", *settings) == 0
    assert f"a step    {told}" in capsys.readouterr().out


def test_dry_run_prints_settings_and_data_and_writes_nothing(train, tmp_path, capsys):
    assert train("--dry-run") == 0
    out = capsys.readouterr().out
    assert "max_steps" in out
    assert "6 txt" in out
    assert not (tmp_path / "run").exists()


def test_first_line_says_which_model_and_why(train, capsys):
    train("--dry-run", "--model", "tiny")
    assert capsys.readouterr().err.splitlines()[0].startswith("model: tiny")


def test_micro_batches_change_nothing_but_rounding(train, tmp_path):
    assert (
        train("--max-steps", 2, name="a")
        == train("--max-steps", 2, "train.micro_batch_size=3", name="b")
        == 0
    )
    for first, second in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True):
        assert first["loss_plus"] == pytest.approx(second["loss_plus"], rel=1e-5)


def test_flips_dropout_and_repeats_change_what_is_seen(train, tmp_path):
    def losses(*settings, name):
        assert train("--max-steps", 3, *settings, name=name) == 0
        return [line["loss"] for line in metrics(tmp_path / name) if "loss" in line]

    plain = losses(name="plain")
    for setting in ("data.flip=true", "data.caption_dropout=0.5", "data.repeats=2"):
        found = losses(setting, name=setting)
        assert len(found) == 3
        assert found != plain, setting


def test_images_without_captions_need_one(train, images, capsys):
    for file in images.glob("*.txt"):
        file.unlink()
    assert train("--max-steps", 1) == 2
    assert "--caption" in capsys.readouterr().err
    assert (
        train("--max-steps", 1, "--caption", "a picture in [trigger] style", "--trigger", "sks")
        == 0
    )


def test_one_image_is_enough(train, images, tmp_path):
    for index in range(1, 6):
        (images / f"{index}.png").unlink()
        (images / f"{index}.txt").unlink()
    assert train("--max-steps", 1) == 0
    assert [row["file"] for row in json.loads((tmp_path / "run/dataset.json").read_text())] == [
        "0.png"
    ]


def test_one_bad_image_of_many_is_named_and_the_run_goes_on(train, images, tmp_path, capsys):
    (images / "broken.png").write_bytes((images / "0.png").read_bytes()[:40])
    assert train("--max-steps", 1) == 0
    assert "broken.png" in capsys.readouterr().err
    assert train("--max-steps", 1, "--strict", name="strict") == 2
    assert "broken.png" in capsys.readouterr().err
    assert not (tmp_path / "strict").exists()


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

    monkeypatch.setattr(style_run, "velocity_loss", spoiled)
    error = failing(capsys, train("--max-steps", 50, "qzo.regions=1"))
    assert "10 steps in a row" in error
    run = tmp_path / "run"
    assert sum(line["skipped"] for line in metrics(run) if "skipped" in line) == 10
    assert (run / "checkpoints/step_000010/COMPLETE").exists()


def test_ctrl_c_finishes_the_step_saves_and_exits_130(train, tmp_path):
    run = tmp_path / "run"

    over = threading.Event()

    def interrupt():
        while not over.wait(0.02):
            log = run / "metrics.jsonl"
            if log.exists() and any("loss_plus" in line for line in log.read_text().splitlines()):
                os.kill(os.getpid(), signal.SIGINT)
                return

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        assert train("--max-steps", 100_000) == 130
    finally:
        over.set()
        thread.join()
    assert signal.getsignal(signal.SIGINT) is before
    (checkpoint,) = (run / "checkpoints").iterdir()
    steps = [line["step"] for line in metrics(run) if "loss" in line]
    assert checkpoint.name == f"step_{len(steps):06d}"
    assert (checkpoint / "COMPLETE").exists()


def test_sampling_a_run_gives_its_last_pictures(train, tmp_path, prompts):
    assert train("--max-steps", 2, "train.lr=0.05") == 0
    run, out = tmp_path / "run", tmp_path / "pictures"
    common = ["sample", "--run", str(run), "--prompts", str(prompts)]
    assert main([*common, "--output-dir", str(out)]) == 0
    table = json.loads((out / "samples/prompts.json").read_text())
    assert [row["prompt"] for row in table] == ["red apple", "banana"]
    assert main([*common, "--output-dir", str(tmp_path / "base"), "--strength", "0"]) == 0
    tuned, base = (
        Image.open(folder / "samples/000.png").tobytes() for folder in (out, tmp_path / "base")
    )
    assert tuned != base

    def cell(step):
        """The first picture of a step's grid, at its own size."""
        grid = Image.open(run / f"samples/step_{step:06d}.png")
        return grid.crop((0, 16, 128, 144)).resize((32, 32), Image.Resampling.NEAREST).tobytes()

    assert tuned == cell(2)
    assert base == cell(0)


def test_scales_of_another_quantization_are_refused(train, tmp_path, prompts, capsys):
    assert train("--max-steps", 1) == 0
    config = tmp_path / "run/config.yaml"
    settings = yaml.safe_load(config.read_text())
    settings["quant"]["type"] = "fp4"
    config.write_text(yaml.safe_dump(settings))
    capsys.readouterr()
    code = main(
        [
            "sample",
            "--run",
            str(tmp_path / "run"),
            "--prompts",
            str(prompts),
            "--output-dir",
            str(tmp_path / "out"),
        ]
    )
    assert "other codes" in failing(capsys, code)


def test_sampling_a_run_that_is_not_there(tmp_path, capsys):
    code = main(
        [
            "sample",
            "--run",
            str(tmp_path / "none"),
            "--model",
            "tiny",
            "--output-dir",
            str(tmp_path / "out"),
        ]
    )
    assert "no tuned scales" in failing(capsys, code)


def test_validate_shows_all_settings(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("train:\n  lr: 0.5\n")
    assert main(["validate", "--config", str(path)]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["train"]["lr"] == 0.5
    assert shown["quant"]["blocksize"] == 64


def test_validate_refuses_a_typo(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("train:\n  lrr: 0.5\n")
    assert "did you mean" in failing(capsys, main(["validate", "--config", str(path)]))


def test_doctor_says_that_all_is_well(capsys, monkeypatch):
    # with a GPU it misses the weights of the large model
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["problems"] == []
    assert "tiny" in facts["model"]
    assert main(["doctor"]) == 0
    assert "everything that a run needs is here" in capsys.readouterr().out


def test_style_dir_is_needed(capsys):
    assert "--style-dir" in failing(capsys, main(["train", "--model", "tiny"]))


def test_a_model_folder_with_pickles_only(train, tmp_path, capsys):
    import shutil

    from qzo_diffusion.resources import tiny_model

    model = shutil.copytree(tiny_model(), tmp_path / "model")
    for file in (model / "transformer").glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    assert "pickles" in failing(capsys, train("--max-steps", 1, "--model", model))


def test_rows_with_directions_of_their_own_in_chosen_layers(train, tmp_path):
    settings = [
        "qzo.parametrization=row",
        "qzo.per_example=true",
        "qzo.num_directions=2",
        "qzo.layers=[ff.net]",
        "data.resolution=64",
    ]
    assert train("--max-steps", 2, "data.batch_size=3", *settings) == 0
    first, *_ = read_journal(tmp_path / "run" / "journal.qzo").steps
    assert len(first.projected_grad) == 3 * 2 * 16  # examples, directions, patch groups
    assert train("--max-steps", 0, name="base") == 0
    base, tuned = load_scales(tmp_path / "base")[0], load_scales(tmp_path / "run")[0]
    changed = {name for name in tuned if not torch.equal(base[name], tuned[name])}
    assert changed == {name for name in tuned if ".ff.net." in f".{name}."}


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ("qzo.layers=[nowhere]", "no such layer"),
        ("qzo.per_example=true qzo.parametrization=dense", "per_example"),
    ],
)
def test_bad_choices_of_numbers(train, capsys, setting, word):
    assert word in failing(capsys, train("--max-steps", 1, *setting.split()))
