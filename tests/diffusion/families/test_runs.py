"""A run of three steps of each family, its samples, its resume and its exports, by the command
line.
"""

import shutil

import pytest
import torch

from benchmarks.families import runs, small
from qzo_diffusion.cli import main
from qzo_diffusion.core.journal import read_journal
from qzo_diffusion.diffusion.families import registry
from qzo_diffusion.diffusion.sampling import load_picture
from tests.conftest import failing
from tests.diffusion.families.conftest import FEW
from tests.runs.short_run import assert_replayed

NEW = [name for name in small.NAMES if name != "sd3"]


@pytest.mark.parametrize("name", NEW)
def test_three_steps_are_trained_and_sampled(run_of, tmp_path, name):
    run = run_of(name)[1]
    assert len(read_journal(run / "journal.qzo").steps) == 3
    out = tmp_path / "pictures"
    assert main(["sample", "--run", str(run), "--prompt", "red", "--output-dir", str(out)]) == 0
    assert load_picture(out / "samples/000.png").size == (small.SIDE, small.SIDE)


@pytest.mark.slow
@pytest.mark.parametrize("name", NEW)
def test_exports_are_read_by_plain_diffusers(run_of, name):
    errors = runs.export_errors(*run_of(name))
    assert errors["nf4"] < 1e-5
    assert errors["bf16"] < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", NEW)
def test_a_stopped_run_goes_on_and_is_replayed_to_the_same_bits(run_of, tmp_path, name):
    from safetensors.torch import load_file

    model, whole = run_of(name)
    part = runs.train(model, tmp_path / "part", "--max-steps", "2", *FEW)
    assert main(["train", "--resume", str(part), "--max-steps", "3"]) == 0
    command = ["replay", "--journal", str(whole / "journal.qzo"), "--model", str(model)]
    assert main([*command, "--output-dir", str(tmp_path / "replayed")]) == 0
    wanted = load_file(whole / "final/scales.safetensors")
    for run in (tmp_path / "replayed", part):
        found = load_file(run / "final/scales.safetensors")
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


WRITTEN = {
    "original": ("bf16", ("--layout", "original"), "original_layout.safetensors"),
    "gguf": ("gguf", ("--quantize-to", "Q8_0"), "*.gguf"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("name", ["flux1", "flux2", "qwen_image", "zimage"])
def test_a_single_file_of_a_run_is_tuned(run_of, tmp_path, name, kind):
    model, run = run_of(name)
    form, more, file = WRITTEN[kind]
    folder = tmp_path / form
    command = ["export", "--run", str(run), "--format", form, *more]
    assert main([*command, "--output-dir", str(folder)]) == 0
    (found,) = folder.glob(file)
    again = ("--transformer", str(found), *FEW)
    same = runs.train(model, tmp_path / "same", "--max-steps", "0", *again)
    (wanted, family), (read, _) = runs.tuned_model(run), runs.tuned_model(same)
    batch = runs.some_batch(model, family)
    predictions = [runs.prediction(one, family, batch) for one in (wanted, read)]
    off = (predictions[1] - predictions[0]).norm() / predictions[0].norm()
    assert off < 0.02  # roundings to 8 bits, or to bfloat16 and NF4 again
    assert_replayed(runs.train(model, tmp_path / "tuned", "--max-steps", "1", *again))


@pytest.mark.slow
def test_a_family_that_was_named_is_found_by_a_replay(run_of, tmp_path):
    model = shutil.copytree(run_of("sd15")[0], tmp_path / "model")
    index = model / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "OwnPipeline"))
    run = runs.train(model, tmp_path / "run", "--max-steps", "1", "--family", "sd15", *FEW)
    assert_replayed(run)


def test_an_unknown_family_is_refused_with_the_known_ones(tmp_path, capsys):
    model = small.write("sd15", tmp_path / "model")
    command = ["sample", "--model", str(model), "--family", "sd9", "--prompt", "a"]
    error = failing(capsys, main([*command, "--output-dir", str(tmp_path / "out")]))
    assert all(family.name in error for family in registry.FAMILIES)


def test_min_snr_and_missing_t5_are_refused_where_they_mean_nothing(tmp_path, capsys):
    model = small.write("flux1", tmp_path / "model")
    runs.write_pictures(tmp_path / "pictures", 2)
    command = ["train", "--model", str(model), "--style-dir", str(tmp_path / "pictures")]
    command += ["--caption", "a", "--dry-run", f"data.resolution={small.SIDE}"]
    assert "rectified flow" in failing(capsys, main([*command, "sigma.min_snr=5"]))
    assert "text.t5=none" in failing(capsys, main([*command, "text.t5=none"]))
