"""`train` as a user types it: the files of a run, and what each setting changes."""

import json
import os
import signal
import threading

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from qzo_diffusion.cli import main
from qzo_diffusion.config.files import read_yaml
from qzo_diffusion.core.journal import read_journal
from qzo_diffusion.diffusion.sampling import cells, load_picture
from qzo_diffusion.resources import shipped
from qzo_diffusion.runs.tuned import load_scales
from tests.conftest import FAST, failing, metrics


@pytest.mark.usefixtures("small_tiny")
def test_a_run_leaves_what_the_contract_names(train, tmp_path, capsys):
    assert (
        train(
            "--model",
            "tiny",
            "--max-steps",
            3,
            "--json",
            "sample.every=2",
            "train.calibrate_lr=true",
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
    [
        ["train.calibrate_lr=true"],
        ["qzo.parametrization=dense", "train.optimizer=adam"],
        ["qzo.num_directions=2"],
    ],
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
    model = ["--model", "tiny"] if preset == "tiny" else []  # whose directions it goes along
    assert train("--preset", preset, *model, "--max-steps", 1) == 0
    resolved = read_yaml(tmp_path / "run/config.yaml")
    given = {option.partition("=")[0] for option in FAST} | {"train.max_steps", "model"}
    checked = 0
    for section, settings in read_yaml(shipped("configs") / f"{preset}.yaml").items():
        for name, value in settings.items() if isinstance(settings, dict) else ():
            if f"{section}.{name}" not in given:
                assert resolved[section][name] == value, (section, name)
                checked += 1
    assert checked or preset == "default"  # which only names a model
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
        assert main(["evaluate", "--run", str(run), "--scorer", "embedded"]) == 0
        signal = json.loads((run / "evaluation.json").read_text())["signal"]
        assert "exact" not in signal["base"]  # scales of int8 have no columns to compare with


def test_the_schedule_and_the_number_of_steps_set_the_rate(train, capsys):
    assert train("--max-steps", 500, "--dry-run") == 0
    assert "lr: 0.05\n" in capsys.readouterr().out
    assert train("--max-steps", 500, "--dry-run", "train.schedule=cosine") == 0
    assert "lr: 0.04\n" in capsys.readouterr().out


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


def test_one_image_is_enough(train, images, tmp_path):
    for index in range(1, 6):
        (images / f"{index}.png").unlink()
        (images / f"{index}.txt").unlink()
    assert train("--max-steps", 1) == 0
    assert [row["file"] for row in json.loads((tmp_path / "run/dataset.json").read_text())] == [
        "0.png"
    ]


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
