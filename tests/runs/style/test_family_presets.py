"""Presets of each family fit the card in their name, by plans on the meta device."""

import math
from pathlib import Path

import pytest
import torch

from qzo_diffusion.config.files import load_config
from qzo_diffusion.diffusion import memory
from qzo_diffusion.diffusion.families.registry import FAMILIES
from qzo_diffusion.diffusion.pipeline_shape import known_shape
from qzo_diffusion.resources import shipped
from qzo_diffusion.runs.style import memory as planning
from qzo_diffusion.runs.style.pipeline import Runtime

GIGABYTES = {
    "flux1_dev_12gb": 12,
    "flux2_klein_4b_8gb": 8,
    "qwen_image_16gb": 16,
    "sdxl_6gb": 6,
    "sd15_4gb": 4,
    "zimage_8gb": 8,
}
# from the model cards: 12 B, 4 B, 20 B, 2.6 B, 860 M, 6 B
PARAMETERS = {
    "flux1_dev_12gb": 11.9e9,
    "flux2_klein_4b_8gb": 3.88e9,
    "qwen_image_16gb": 20.43e9,
    "sdxl_6gb": 2.57e9,
    "sd15_4gb": 0.86e9,
    "zimage_8gb": 6.15e9,
}


@pytest.mark.parametrize("preset", GIGABYTES)
def test_a_preset_fits_the_card_in_its_name(preset, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)
    config = load_config(shipped("configs") / f"{preset}.yaml")
    shape = known_shape(config.model)
    count = sum(math.prod(entry.shape) for entry in shape.transformer.entries.values())
    assert count == pytest.approx(PARAMETERS[preset], rel=0.01)
    place = Runtime(Path(config.model), torch.device("cuda"), torch.bfloat16, shape)
    plan = planning.memory_plan(config, place, images=20, prompts=30)
    assert plan.peak < 0.95e9 * GIGABYTES[preset], plan.describe()


def test_every_family_has_published_models():
    for family in FAMILIES:
        assert family.published
        for model in family.published.values():
            assert family.denoiser.owns(model.denoiser)
            assert set(model.encoders) == set(family.texts.classes)
