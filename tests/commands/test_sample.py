"""`sample`: whatever part of a run is given, its settings hold; failures leave nothing."""

import json
import shutil

import pytest
import yaml
from PIL import Image

from qzo_diffusion.cli import main
from qzo_diffusion.core.errors import OutputError
from tests.commands.short_runs import sampled
from tests.conftest import failing

pytestmark = pytest.mark.usefixtures("small_tiny")


@pytest.mark.parametrize("part", ["checkpoints/step_000002", "final", "final/scales.safetensors"])
def test_whatever_part_of_a_run_is_sampled_has_its_settings(coarse, tmp_path, capsys, part):
    prompt = "red apple in [trigger] style"
    whole = sampled(tmp_path, coarse, "whole", prompt=prompt)
    own = sampled(tmp_path, coarse / part, "part", prompt=prompt)
    assert whole == own
    assert (
        json.loads((tmp_path / "part/samples/prompts.json").read_text())[0]["prompt"]
        == "red apple in zxq style"
    )
    assert "model: tiny" in capsys.readouterr().err


def test_scales_alone_are_sampled_with_the_defaults_and_that_is_told(finished, tmp_path, capsys):
    alone = shutil.copy(finished / "final" / "scales.safetensors", tmp_path)
    sampled(tmp_path, alone, "out", "--model", "tiny")
    assert "no config.yaml" in capsys.readouterr().err


def test_a_failed_sample_leaves_nothing_and_what_is_there_is_found_at_once(
    coarse, tmp_path, capsys, monkeypatch
):
    from qzo_diffusion.runs.style import sample as sample_run

    command = [
        "sample",
        "--run",
        str(coarse),
        "--model",
        "tiny",
        "--output-dir",
        str(tmp_path / "out"),
    ]

    def broken(*args):
        raise OutputError("got", "expected", "remedy")

    with monkeypatch.context() as patched:
        patched.setattr(sample_run.pipeline, "load_base", broken)
        failing(capsys, main(command))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.png").touch()
    monkeypatch.setattr(sample_run, "load_tuned", None)
    error = failing(capsys, main(command))
    assert "not an empty folder" in error
    assert "--resume" not in error


@pytest.mark.parametrize("strength", ["0.5", "-1"])
def test_a_strength_needs_a_run(tmp_path, capsys, strength):
    command = [
        "sample",
        "--model",
        "tiny",
        "--strength",
        strength,
        "--output-dir",
        str(tmp_path / "out"),
    ]
    assert "without --run" in failing(capsys, main(command))


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
