"""A pipeline of half a billion parameters on pictures of a photograph's size, as a user runs it:
train, samples, resume, memory.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qzo_diffusion import devices, resources
from qzo_diffusion.cli import main

# bfloat16, a GPU's default, where the processor is not forty times slower in it
SLOW = devices.slow_dtype(torch.bfloat16, torch.device("cpu")) is not None
DTYPE = "float32" if SLOW else "bfloat16"
SCRIPT = """
import json, sys
from qzo_diffusion.runs.style import plan as style_run
from qzo_diffusion.cli import main
plans, make_plan = [], style_run.make_plan
style_run.make_plan = lambda *args, **named: plans.append(make_plan(*args, **named)) or plans[-1]
assert main(sys.argv[1:]) == 0
status = open("/proc/self/status")
peak = [int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")][0]
planned = plans[0].memory()
print(json.dumps({"planned": planned.peak, "measured": peak, "plan": planned.describe()}))
"""


@pytest.fixture
def pipeline(tmp_path):
    """The embedded model with a random transformer of 0.5 B parameters and a VAE of the real widths
    in place of its own.
    """
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    folder = shutil.copytree(
        resources.tiny_model(),
        tmp_path / "model",
        ignore=shutil.ignore_patterns("transformer", "vae"),
    )
    tiny = json.loads((resources.tiny_model() / "transformer" / "config.json").read_text())
    shape = {
        "num_layers": 8,
        "num_attention_heads": 22,
        "caption_projection_dim": 1408,
        "pos_embed_max_size": 96,
        "sample_size": 64,
    }
    model = SD3Transformer2DModel.from_config(tiny | shape | {"sample_size": 64}).to(torch.bfloat16)
    assert 0.45e9 < sum(parameter.numel() for parameter in model.parameters()) < 0.6e9
    model.save_pretrained(folder / "transformer", max_shard_size="500MB")
    vae = json.loads((resources.tiny_model() / "vae" / "config.json").read_text()) | {
        "block_out_channels": [128, 256, 512, 512]
    }
    vae |= {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "norm_num_groups": 32,
    }
    AutoencoderKL.from_config(vae).save_pretrained(folder / "vae")
    return folder


def run(*arguments):
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
    }
    command = [sys.executable, "-c", SCRIPT, "train", *map(str, arguments)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env=environment,
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def photographs(folder, count):
    """JPEG files with coarse and fine structure, larger than what they are cut to."""
    folder.mkdir()
    for index in range(count):
        drawn = np.random.default_rng(index)
        coarse = Image.fromarray(drawn.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        fine = Image.fromarray(drawn.integers(0, 256, (540, 720, 3), dtype=np.uint8))
        picture = Image.blend(coarse.resize(fine.size, Image.Resampling.BICUBIC), fine, 0.2)
        picture.save(folder / f"{index:02d}.jpg")
    return folder


@pytest.mark.slow
def test_twenty_pictures_through_half_a_billion_parameters(pipeline, tmp_path):
    photos = photographs(tmp_path / "photos", 20)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photograph\n")
    arguments = [
        "--model",
        pipeline,
        "--style-dir",
        photos,
        "--caption",
        "a photograph",
        "--sample-prompts",
        prompts,
    ]
    arguments += [
        "--output-dir",
        tmp_path / "run",
        f"data.cache_dir={tmp_path / 'cache'}",
        f"compute.dtype={DTYPE}",
    ]
    arguments += [
        "data.resolution=512",
        "data.batch_size=4",
        "train.micro_batch_size=2",
        "sample.steps=2",
        "sample.guidance=1.0",
    ]
    arguments += ["sample.every=0", "train.validate_every=0", "train.checkpoint_every=1"]
    first = run(*arguments, "--max-steps", 2)
    print(first["plan"])
    assert 0.9 < first["planned"] / first["measured"] < 1.1, first
    whole = (tmp_path / "run" / "samples" / "grid.png").read_bytes()
    assert whole
    # Killed before its end was written: the end is written, and nothing is done twice.
    shutil.rmtree(tmp_path / "run" / "final")
    again = run("--resume", tmp_path / "run", "--output-dir", tmp_path / "run")
    assert again["measured"] > 0
    assert (tmp_path / "run" / "final" / "COMPLETE").is_file()
    assert_both_layouts_hold_the_same_weights(tmp_path)


def assert_both_layouts_hold_the_same_weights(place):
    """The bf16 export of the run, as diffusers reads its own layout and the single file in the
    original one.
    """
    from diffusers import SD3Transformer2DModel

    out = place / "exported"
    assert (
        main(["export", "--run", str(place / "run"), "--format", "bf16", "--output-dir", str(out)])
        == 0
    )
    shutil.copytree(out, place / "only_config", ignore=shutil.ignore_patterns("*.safetensors"))
    own = SD3Transformer2DModel.from_pretrained(out, dtype=torch.bfloat16).state_dict()
    single = str(out / "original_layout.safetensors")
    other = SD3Transformer2DModel.from_single_file(
        single, config=str(place / "only_config"), dtype=torch.bfloat16
    ).state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in own.items())
