"""Our forward of each family is that of its plain pipeline, and its objective that of its
scheduler.
"""

import pytest
import torch

from benchmarks.families import equality, small
from qzo_diffusion.diffusion.families import registry

VARIANTS = [
    ("sd3", {}),
    ("flux1", {}),
    ("flux1", {"guidance": False}),
    ("flux2", {}),
    ("qwen_image", {}),
    ("sdxl", {}),
    ("sd15", {}),
    ("sd15", {"prediction": "v_prediction"}),
    ("zimage", {}),
]


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_our_forward_is_that_of_the_plain_pipeline(made, tmp_path, name, settings):
    folder, family = made(name, settings), registry.by_name(name)
    denoiser, calls = equality.plain_calls(folder, family, torch.float64)
    assert len(calls) >= equality.STEPS
    for call in calls:
        ours, prediction = equality.our_call(folder, family, denoiser, tmp_path, call)
        assert equality.differences(call, ours) == []
        assert prediction.dtype == torch.float32
        assert prediction.dim() == 4


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
@pytest.mark.parametrize("level", [0.3, 0.9])
def test_a_true_target_leads_to_the_clean_latents(made, name, settings, level):
    error = equality.clean_from_one_step(made(name, settings), registry.by_name(name), level)
    assert error < 2e-5  # a few roundings in fp32 of numbers up to 15


@pytest.mark.parametrize("name", small.NAMES)
def test_a_family_is_found_by_its_folder(made, name):
    from qzo_diffusion.diffusion.model_folder import check_model_folder, family_of_folder

    folder = made(name, {})
    family = family_of_folder(folder)
    assert family.name == name
    check_model_folder(folder, family)
