"""A GGUF file of pictures through the command line: trained, stopped, replayed, sampled, exported,
and read by diffusers.
"""

import json
import shutil
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from qzo_diffusion.cli import main
from qzo_diffusion.config.files import load_config, make_config, read_yaml
from qzo_diffusion.core.journal import read_journal
from qzo_diffusion.core.merge import merge_changes_
from qzo_diffusion.diffusion.transformer import find_transformer
from qzo_diffusion.quant.gguf import FACTORS, GgufLinear
from qzo_diffusion.quant.gguf_header import read_gguf_header
from qzo_diffusion.quant.load import handles_of
from qzo_diffusion.runs.style import pipeline as style_pipeline
from qzo_diffusion.runs.tuned import load_scales
from tests.commands.short_runs import export_arguments, sampled
from tests.conftest import failing, write_squares
from tests.gguf_pictures import plain_weights, seen_by_comfyui, write_gguf
from tests.runs.short_run import assert_replayed, assert_same_run, resume, stop_after
from tests.small_models import sd3_inputs

STEPS = 20
RUN_ON_REWARDS = ["compute.dtype=float32", "sample.steps=1", "train.lr=0.2"]


@pytest.fixture(scope="session")
def place(tmp_path_factory, pipeline):
    """A folder with the small pipeline's transformer in Q4_0, images and prompts."""
    from diffusers import SD3Transformer2DModel

    folder = tmp_path_factory.mktemp("gguf")
    model = SD3Transformer2DModel.from_pretrained(pipeline / "transformer")
    write_gguf(folder / "small-Q4_0.gguf", model)
    write_squares(folder / "imgs", [(90 * index, 0, 50) for index in range(2)])
    (folder / "prompts.txt").write_text("red apple\n")
    return folder


def train(place, command_line, name, *more):
    quick = ["data.batch_size=1", "sample.steps=1", "train.calibrate_lr=false", "train.lr=0.01"]
    arguments = ["--transformer", place / "small-Q4_0.gguf", "--caption", "a square", *quick]
    places = {"style_dir": place / "imgs", "prompts": place / "prompts.txt"}
    return main(command_line(*arguments, *more, **places, output_dir=place / name))


@pytest.fixture(scope="session")
def run(place, command_line):
    assert train(place, command_line, "run", "--max-steps", STEPS) == 0
    return place / "run"


def tuned_model(run):
    config = make_config(read_yaml(run / "config.yaml"))
    model, scales, _ = style_pipeline.load_base(config, style_pipeline.find_runtime(config))
    merge_changes_(scales, [(load_scales(run)[0], 1.0)])
    return model


def read_by_diffusers(file, pipeline, tmp_path):
    from diffusers import GGUFQuantizationConfig, SD3Transformer2DModel

    (tmp_path / "only_config").mkdir()
    shutil.copy(pipeline / "transformer" / "config.json", tmp_path / "only_config")
    return SD3Transformer2DModel.from_single_file(
        str(file),
        config=str(tmp_path / "only_config"),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        dtype=torch.float32,
    )


def test_the_exported_file_differs_in_factors_alone_and_diffusers_reads_it(
    run, place, pipeline, tmp_path, capsys
):
    capsys.readouterr()
    assert main([*export_arguments(run, tmp_path / "out", "gguf"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    source, target = place / "small-Q4_0.gguf", tmp_path / "out" / "small-Q4_0-tuned.gguf"
    assert target.name in facts["files"]
    assert 0.9 < facts["change_kept"] < 1.1
    before, after = source.read_bytes(), target.read_bytes()
    assert len(before) == len(after)
    allowed, header = set(), read_gguf_header(source)
    for tensor in header.tensors.values():
        if tensor.kind == 2:  # Q4_0: 18 bytes for 32 weights
            start = header.data + tensor.offset
            for block in range(tensor.shape[0] * tensor.shape[1] // 32):
                allowed |= {start + 18 * block + place for place in (*FACTORS["Q4_0"], 1)}
    changed = {at for at in range(len(before)) if before[at] != after[at]}
    assert changed
    assert changed <= allowed

    tuned, theirs = tuned_model(run), read_by_diffusers(target, pipeline, tmp_path)
    assert seen_by_comfyui(target).items() <= dict(theirs.config).items()
    layers = [name for name, one in tuned.named_modules() if isinstance(one, GgufLinear)]
    named = find_transformer(target).entries
    for name in layers:
        weight = tuned.get_submodule(name).dequantized()
        off = (named[f"{name}.weight"].read() - weight).abs()
        assert (off <= 2.0**-11 * weight.abs() * 1.001).all(), name  # half a step of a factor
    x = sd3_inputs(tuned)
    with torch.no_grad():
        wanted, found = tuned(**x).sample, theirs(**x).sample
    # Diffusers rounds each product to fp16 as well: 2^-10 of a weight in all, through a dozen
    # products one behind the other.
    assert (found - wanted).norm() < 12 * 2.0**-10 * wanted.norm()


def test_a_stopped_run_goes_on_to_the_same_end_and_is_replayed(place, command_line, monkeypatch):
    more = ["--max-steps", 4, "train.checkpoint_every=2", "qzo.parametrization=dense"]
    assert train(place, command_line, "whole", *more) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert train(place, command_line, "stopped", *more) == 130
    assert resume(place / "stopped") == 0
    assert_same_run(place / "whole", place / "stopped")
    assert_replayed(place / "whole")


def test_a_run_on_rewards_goes_on_is_replayed_and_exported(
    place, pipeline, cache, tmp_path, monkeypatch
):
    few = ["reward.steps=1", "data.resolution=32", "data.batch_size=1", "sample.every=0"]
    command = ["train", "--model", pipeline, "--transformer", place / "small-Q4_0.gguf", *few]
    command += ["--reward", "brightness", "--prompts", place / "prompts.txt", *RUN_ON_REWARDS]
    command += ["--output-dir", tmp_path / "run", f"data.cache_dir={cache}", "--max-steps", 2]
    with monkeypatch.context() as patch:
        stop_after(patch, 0)
        assert main([str(part) for part in command]) == 130
    assert resume(tmp_path / "run") == 0
    assert len(read_journal(tmp_path / "run/journal.qzo").steps) == 2
    assert_replayed(tmp_path / "run")
    assert main(export_arguments(tmp_path / "run", tmp_path / "out", "gguf")) == 0
    exported = tmp_path / "out/small-Q4_0-tuned.gguf"
    assert exported.read_bytes() != (place / "small-Q4_0.gguf").read_bytes()


def test_a_run_is_sampled_and_its_base_stays(run, place, tmp_path):
    before = (place / "small-Q4_0.gguf").read_bytes()
    pictures = [
        sampled(tmp_path, run, f"s{strength}", "--strength", strength) for strength in ("0", "1")
    ]
    assert pictures[0] != pictures[1]
    assert (place / "small-Q4_0.gguf").read_bytes() == before


def test_the_written_file_draws_what_the_run_draws(run, pipeline, tmp_path):
    assert main(export_arguments(run, tmp_path / "out", "gguf")) == 0
    of_run = sampled(tmp_path, run, "of_run")
    file = tmp_path / "out" / "small-Q4_0-tuned.gguf"
    command = [
        "sample",
        "--model",
        pipeline,
        "--transformer",
        file,
        "--prompts",
        tmp_path / "p.txt",
    ]
    given = load_config(run / "config.yaml")
    command += ["--steps", given.sample.steps, "--seed", given.sample.seed]
    assert main([*map(str, command), "--output-dir", str(tmp_path / "of_file")]) == 0
    pictures = of_run, (tmp_path / "of_file" / "samples" / "000.png").read_bytes()
    one, other = (np.asarray(Image.open(BytesIO(data)), dtype=np.int16) for data in pictures)
    assert abs(one - other).max() <= 2  # factors of 16 bits


def test_an_untrained_run_gives_the_file_back_byte_for_byte(place, command_line, tmp_path):
    assert train(place, command_line, "none", "--max-steps", 0) == 0
    assert main(export_arguments(place / "none", tmp_path / "out", "gguf")) == 0
    written = (tmp_path / "out" / "small-Q4_0-tuned.gguf").read_bytes()
    assert written == (place / "small-Q4_0.gguf").read_bytes()
    assert "changed nothing" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("nf4", [], "use --format gguf"),
        ("gguf", ["--quantize-to", "Q8_0"], "leave --quantize-to out"),
        ("bf16", ["--dither"], "export as gguf"),
    ],
)
def test_what_does_not_fit_a_gguf_run_is_told(run, tmp_path, capsys, kind, more, said):
    code = main([*export_arguments(run, tmp_path / "out", kind), *more])
    assert said in failing(capsys, code)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("small_tiny")
def test_a_run_on_another_base_is_quantized(finished, tmp_path, capsys):
    arguments = export_arguments(finished, tmp_path / "out", "gguf")
    assert "--quantize-to Q8_0" in failing(capsys, main(arguments))
    assert main([*arguments, "--quantize-to", "Q8_0", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["weight_error"] < 2.0**-7  # 8 bits: half a step of the block's largest over 127
    file = tmp_path / "out" / "tiny-tuned-Q8_0.gguf"
    tuned, weights = tuned_model(finished), plain_weights(file)
    assert seen_by_comfyui(file).items() <= dict(tuned.config).items()
    for original, ours in (
        ("joint_blocks.0.x_block.mlp.fc1", "transformer_blocks.0.ff.net.0.proj"),
        ("joint_blocks.1.x_block.attn.proj", "transformer_blocks.1.attn.to_out.0"),
    ):
        wanted = next(h for h in handles_of(tuned) if h.name == ours).dequantized().float()
        found = weights[f"{original}.weight"]
        assert (found - wanted).abs().max() <= wanted.abs().max() / 127
