"""Runs on a style warn where the model was distilled to few steps: its pictures blur."""

import pytest

from qzo_diffusion.config.files import make_config
from qzo_diffusion.diffusion.pipeline_shape import known_shape
from qzo_diffusion.runs.style import plan, reward_plan
from qzo_diffusion.runs.style.checks import warn_of_distilled

DEV, SCHNELL = "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"
LARGE = "stabilityai/stable-diffusion-3.5-large"
TURBO = f"{LARGE}-turbo"


def warning(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if "distilled" in line]


@pytest.mark.parametrize("model", [SCHNELL, TURBO])
def test_a_run_on_a_style_warns_and_names_rewards(model, images, prompts, tmp_path, capsys):
    places = {"data": {"style_dir": str(images), "resolution": 512}}
    config = make_config({"model": model, **places, "sample": {"prompts": str(prompts)}})
    plan.make_plan(config, dry_run=True)
    (line,) = warning(capsys)
    assert model in line
    assert "--reward" in line
    scored = {"prompts": str(prompts), "scores": ["brightness"], "second": "none"}
    config = make_config({"model": model, "reward": scored, "data": {"resolution": 512}})
    reward_plan.make_plan(config, dry_run=True)
    assert warning(capsys) == []


@pytest.mark.parametrize(
    ("shape", "settings", "told"),
    [
        (DEV, {"model": DEV}, None),
        (LARGE, {"model": LARGE}, None),
        (SCHNELL, {"model": "mine"}, "mine"),  # its config tells it
        (LARGE, {"model": LARGE, "transformer": "large-Lightning.gguf"}, "large-Lightning.gguf"),
    ],
)
def test_it_is_told_by_the_config_or_by_a_name(shape, settings, told, capsys):
    warn_of_distilled(known_shape(shape), make_config(settings))
    lines = warning(capsys)
    assert len(lines) == (told is not None)
    assert all(told in line for line in lines)
