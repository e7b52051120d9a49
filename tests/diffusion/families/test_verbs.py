"""What follows a run of each family: scores, rewards, deltas on their own and in other programs."""

import json
import math

import pytest
import torch

from benchmarks.families import runs, small
from qzo_diffusion.api import apply_delta
from qzo_diffusion.cli import main
from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.core.journal import read_journal
from tests.diffusion.families.conftest import FEW
from tests.runs.short_run import assert_replayed, resume

NEW = [name for name in small.NAMES if name != "sd3"]
QUICK = "sd15"  # the family whose run on rewards every commit passes


def succeed(*command):
    assert main([str(part) for part in command]) == 0


def pictures(run, out, *more):
    """The bytes of the picture that a run or a delta draws."""
    succeed("sample", "--run", run, "--prompt", "red", "--output-dir", out, *more)
    return (out / "samples/000.png").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", NEW)
def test_a_run_is_scored(run_of, tmp_path, name):
    run, target = run_of(name)[1], tmp_path / "scores.json"
    prompts = runs.write_prompts(tmp_path)
    command = ["evaluate", "--run", run, "--scorer", "embedded", "--prompts", prompts]
    succeed(*command, "--output", target)
    found = json.loads(target.read_text())
    base, tuned = (found["validation_loss"][state] for state in ("base", "tuned"))
    assert 0 < tuned < math.inf
    assert tuned != base
    assert found["clip_score"]["n"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", NEW)
def test_a_delta_draws_what_its_run_draws(run_of, tmp_path, name):
    model, run = run_of(name)
    drawn, delta = pictures(run, tmp_path / "tuned"), runs.export(run, "delta", tmp_path)
    named = ("--model", model)  # a delta names its model by the folder's name alone
    assert pictures(delta, tmp_path / "delta", *named) == drawn
    assert pictures(run, tmp_path / "base", "--strength", "0") != drawn


@pytest.mark.parametrize(
    "name", [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NEW]
)
def test_a_run_on_rewards_goes_on_and_is_replayed(made, tmp_path, name):
    run = runs.train_on_reward(made(name, {}), tmp_path / "run", "--max-steps", "1", *FEW)
    assert resume(run, "--max-steps", "2") == 0
    steps = read_journal(run / "journal.qzo").steps
    assert len(steps) == 2
    assert all(any(step.projected_grad) for step in steps)
    assert_replayed(run)
    rows = json.loads((run / "rewards.json").read_text())["steps"]
    assert all(0 < reward < 1 for row in rows for reward in row["reward"])


class Pipe:
    """A pipeline of diffusers, as far as deltas are concerned."""

    def __init__(self, **parts):
        vars(self).update(parts)


@pytest.mark.slow
def test_a_delta_moves_a_plain_4_bit_pipeline_as_its_run_did(run_of, tmp_path):
    model, run = run_of("flux1")
    tuned, family = runs.tuned_model(run)
    batch = runs.some_batch(model, family)
    none = runs.train(model, run.parent / "none", "--max-steps", "0", *FEW)
    pipe = Pipe(transformer=runs.plain(runs.export(none, "nf4"), family, torch.float32))
    before = runs.prediction(pipe.transformer, family, batch)
    apply_delta(pipe, runs.export(run, "delta", tmp_path))
    wanted, found = (runs.prediction(one, family, batch) for one in (tuned, pipe.transformer))
    off = (found - wanted).norm()
    assert off <= 1e-5 * wanted.norm()  # the same numbers through the same products
    assert (found - before).norm() > 100 * off


def test_a_delta_of_a_unet_is_for_our_own_sampler(tmp_path):
    with pytest.raises(ModelError, match="UNet") as raised:
        apply_delta(Pipe(unet=torch.nn.Linear(2, 2)), tmp_path)
    assert "export" in raised.value.remedy
