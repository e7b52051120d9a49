"""Whole runs along the directions of a file: resumed, replayed, and refused where the file is
another.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qzo_diffusion import resources
from qzo_diffusion.cli import main
from qzo_diffusion.diffusion.transformer import empty_transformer
from qzo_diffusion.quant.choose import chosen
from qzo_diffusion.runs.subspace import load_subspace
from tests.conftest import failing
from tests.runs.short_run import assert_replayed, assert_same_run, in_parts, replay

LAYERS = ("ff.net", "attn.to_out")
ROWS = ["qzo.parametrization=row", "qzo.layers=[ff.net,attn.to_out]", "qzo.regions=4"]
STEPS = ["--max-steps", 4, "train.checkpoint_every=2"]


def write(path, pipeline, directions=6, seed=0):
    config = json.loads((pipeline / "transformer/config.json").read_text())
    rows = {
        name: layer.out_features
        for name, layer in empty_transformer(config).named_modules()
        if isinstance(layer, nn.Linear) and any(part in name for part in LAYERS)
    }
    generator = torch.Generator().manual_seed(seed)
    found = {
        name: torch.randn(directions, count, generator=generator).half()
        for name, count in rows.items()
    }
    save_file(found, path)
    return path


def test_the_embedded_model_has_directions_for_all_rows_that_styles_train():
    config = json.loads((resources.tiny_model() / "transformer/config.json").read_text())
    layers = {
        name: layer.out_features
        for name, layer in empty_transformer(config).named_modules()
        if isinstance(layer, nn.Linear) and name.startswith("transformer_blocks.")
    }
    found = load_subspace("tiny")
    assert {name: one.shape[1] for name, one in found.items()} == {
        name: layers[name] for name in chosen(layers, "image")
    }
    variances = torch.cat([one.double().square().sum(0) for one in found.values()])
    assert variances.mean() == pytest.approx(1, abs=1e-3)  # so that qzo.eps means the same


@pytest.fixture
def file(tmp_path, pipeline):
    return write(tmp_path / "subspace.safetensors", pipeline)


@pytest.mark.usefixtures("pages")
def test_a_run_goes_on_is_replayed_and_judged(
    train, file, tmp_path, monkeypatch, capsys, pipeline, prompts
):
    run = [*STEPS, *ROWS, f"qzo.subspace={file}"]
    assert train(*run, name="run") == 0
    parts = in_parts(train, tmp_path, monkeypatch, *run, after=1)
    assert_same_run(tmp_path / "run", parts)
    assert_replayed(tmp_path / "run")

    command = ["evaluate", "--run", tmp_path / "run", "--scorer", "embedded", "--prompts", prompts]
    assert main([str(part) for part in command]) == 0
    assert "Cosine with the exact gradient" in (tmp_path / "run/report.html").read_text()

    capsys.readouterr()
    write(file, pipeline, seed=1)
    failing(capsys, replay(tmp_path, tmp_path / "run", name="other")[0])
    file.unlink()
    drawn = ["--prompt", "red", "--output-dir", tmp_path / "drawn"]
    command = ["sample", "--run", tmp_path / "run", *drawn]
    assert main([str(part) for part in command]) == 0  # which needs the tuned scales alone
    assert "no such file" in failing(capsys, replay(tmp_path, tmp_path / "run", name="none")[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: dict(list(found.items())[1:]), "directions None"),
        (lambda found: {name: one[:, 1:] for name, one in found.items()}, "directions (6"),
    ],
)
def test_the_file_of_another_model_is_refused(train, file, capsys, change, message):
    save_file({k: v.contiguous() for k, v in change(load_file(file)).items()}, file)
    error = failing(capsys, train(*STEPS, *ROWS, f"qzo.subspace={file}"))
    assert message in error


def test_damaged_files_and_other_numbers_are_refused(train, file, capsys):
    file.write_bytes(file.read_bytes()[:-100])
    assert "damaged" in failing(capsys, train(*STEPS, *ROWS, f"qzo.subspace={file}"))
    failing(capsys, train(*STEPS, "qzo.parametrization=separable", f"qzo.subspace={file}"))
    failing(capsys, train(*STEPS, *ROWS, "qzo.subspace=nowhere.safetensors"))


def test_a_run_goes_on_with_its_own_file_alone(train, file, tmp_path, capsys):
    assert train(*STEPS, *ROWS, f"qzo.subspace={file}", name="whole") == 0
    kept = file.read_bytes()
    save_file({name: 2 * one for name, one in load_file(file).items()}, file)
    resume = ["train", "--resume", str(tmp_path / "whole")]
    error = failing(capsys, main(resume))
    assert f"qzo.subspace={file}" in error
    assert "the same file, with the same content" in error
    file.write_bytes(kept)
    assert main(resume) == 0
