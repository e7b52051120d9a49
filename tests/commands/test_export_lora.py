"""`export --format lora`, as plain diffusers and ComfyUI read it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from qzo_diffusion.cli import main
from qzo_diffusion.config.files import load_config
from qzo_diffusion.core.merge import merge_changes_
from qzo_diffusion.diffusion.families.sd3_layout import layout
from qzo_diffusion.quant.stored import pending_dequantized
from qzo_diffusion.runs.style import pipeline as style_pipeline
from qzo_diffusion.runs.tuned import load_scales
from tests.commands.short_runs import export_arguments
from tests.conftest import failing
from tests.small_models import sd3_inputs

NUMBERS = ("", "_2", "_3")  # of the text encoders
pytestmark = pytest.mark.usefixtures("small_tiny")


def plain_pipeline(run, tuned: bool):
    """A pipeline of diffusers with the unquantized transformer of a run's base, or of its result,
    in fp32.
    """
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    config = load_config(run / "config.yaml")
    base, scales, _ = style_pipeline.load_base(config, style_pipeline.find_runtime(config))
    if tuned:
        merge_changes_(scales, [(load_scales(run)[0], 1.0)])
    model = SD3Transformer2DModel.from_config(base.config)
    tensors = pending_dequantized(base, torch.float32)
    model.load_state_dict({name: one.make() for name, one in tensors.items()}, strict=False)
    parts = dict.fromkeys(("vae", "scheduler"))
    parts |= dict.fromkeys(f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in NUMBERS)
    return StableDiffusion3Pipeline(transformer=model.eval().requires_grad_(False), **parts)


@torch.no_grad()
def prediction(pipe):
    return pipe.transformer(**sd3_inputs(pipe.transformer)).sample


def off(got, wanted, base):
    return float((got - wanted).norm() / (wanted - base).norm())


def figures_of(capsys):
    return json.loads(capsys.readouterr().out)


def test_a_lora_of_full_rank_is_the_tuned_model(export, finished, capsys):
    folder = export("lora", "--rank", "4096", "--json")
    told = figures_of(capsys)
    pipe, tuned = plain_pipeline(finished, False), plain_pipeline(finished, True)
    base, wanted = prediction(pipe), prediction(tuned)
    pipe.load_lora_weights(folder)
    assert off(prediction(pipe), wanted, base) < 1e-2  # factors are in float16
    assert told["forward_error"] < 1e-2
    assert told["norm_kept"] == pytest.approx(1, abs=1e-6)
    assert told["rank"] == 64  # the most that a layer of the small model has


def test_a_lora_of_low_rank_is_off_by_what_it_says(export, finished, capsys):
    told, errors = [], []
    pipe, tuned = plain_pipeline(finished, False), plain_pipeline(finished, True)
    base, wanted = prediction(pipe), prediction(tuned)
    for rank in (2, 16):
        folder = export("lora", "--rank", str(rank), "--json", name=str(rank))
        told.append(figures_of(capsys))
        pipe.load_lora_weights(folder)
        errors.append(off(prediction(pipe), wanted, base))
        pipe.unload_lora_weights()
    assert 0 < told[0]["norm_kept"] < told[1]["norm_kept"] < 1
    assert 1e-2 < errors[1] < errors[0]
    for one, error in zip(told, errors, strict=True):
        # the same figure over other inputs
        assert one["forward_error"] == pytest.approx(error, rel=0.5)


def test_the_layers_have_names_that_comfyui_maps(export, finished):
    """ComfyUI takes `transformer.` and the layer's name in diffusers as the key of a LoRA."""
    tensors = load_file(export("lora") / "pytorch_lora_weights.safetensors")
    ours = {name for pieces in layout(2, (), True).values() for name in pieces.names}
    for name, tensor in tensors.items():
        layer, _, kind = name.removeprefix("transformer.").rpartition(".lora_")
        assert f"{layer}.weight" in ours, name
        assert kind in ("A.weight", "B.weight")
        assert tensor.dtype == torch.float16
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {32}


def test_the_card_says_what_the_rank_keeps(export, capsys):
    folder = export("lora", "--rank", "4")
    said = capsys.readouterr().err
    assert "Rank 4 keeps" in said
    text = (folder / "README.md").read_text()
    assert "load_lora_weights" in text
    (sentence,) = [line for line in text.splitlines() if line.startswith("Rank 4 keeps")]
    assert sentence in said


def test_a_run_without_a_change_has_no_lora(run_of_no_step, tmp_path, capsys):
    command = export_arguments(run_of_no_step, tmp_path / "out", "lora")
    assert "a run that changed no weight" in failing(capsys, main(command))
    assert not (tmp_path / "out").exists()


def test_a_rank_of_zero_is_refused(finished, tmp_path, capsys):
    command = [*export_arguments(finished, tmp_path / "out", "lora"), "--rank", "0"]
    assert "a whole number, 1 or more" in failing(capsys, main(command))
