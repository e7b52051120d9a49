"""A short run of `qzo-diffuse llm` on a tiny Llama: how it is made and compared."""

import json
import re

import torch
from safetensors.torch import load_file

from qzo_diffusion.cli import main
from qzo_diffusion.config.files import read_yaml
from qzo_diffusion.runs.tuned import load_scales

METHODS = ["qzo", "mezo", "quzo", "quzo-lora", "qlora", "fo-scales"]


EACH_CODE = ["--method", "quzo", "qzo.parametrization=codes"]


STEPS = 6


EACH_STEP = ["train.checkpoint_every=1"]


def command_line(output_dir, model, data, *more):
    """The command line of a short run."""
    base = ["llm", "train", "--task", "sst2", "--data-dir", data, "--output-dir", output_dir]
    base += [] if "--model" in more else ["--model", model]
    base += [] if "--max-steps" in more else ["--max-steps", STEPS]
    small = ["data.batch_size=4", "data.train_examples=16", "data.validation_examples=8"]
    rest = ["train.validate_every=2", "train.checkpoint_every=2", "compute.dtype=float32"]
    return [str(part) for part in [*base, *small, *rest, *more]]


def assert_same_weights(first, second):
    one, other = (load_file(folder / "final" / "scales.safetensors") for folder in (first, second))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


SECOND_BLOCK = "qzo.layers=[layers.1]"  # what the first one gives is kept


def assert_found_again(run, settings, capsys):
    """The settings are the run's, its scales moved, and `llm evaluate` finds what it ended with."""
    ended = json.loads(capsys.readouterr().out)["accuracy"]["end"]
    resolved = read_yaml(run / "config.yaml")
    for setting in settings:
        section, name, value = re.split("[.=]", setting)
        assert resolved[section][name] == value
    first, last = (load_scales(run / f"checkpoints/step_00000{step}")[0] for step in (1, 2))
    assert any(not torch.equal(first[name], last[name]) for name in first)
    assert main(["llm", "evaluate", "--run", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == ended
