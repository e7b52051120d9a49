"""The proof at full size runs through all of its stages on small models."""

from dataclasses import replace

import pytest
import torch

from benchmarks.families import small
from benchmarks.families.results import record
from benchmarks.full_size import __main__ as full_size
from benchmarks.full_size.model import Subject
from qzo_diffusion.diffusion.families import registry
from qzo_diffusion.system.reading import read_json

QWEN3 = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


LAYERS = {"zimage": 2, "flux2_klein_4b": 28}  # klein reads a state behind the 27th
# each dtype once; many processors are slow in bfloat16
DTYPES = {"zimage": torch.float32, "flux2_klein_4b": torch.bfloat16}


def subject_of(name):
    """A model in the widths of its family's small pipeline."""
    layers = LAYERS[name]
    family, published = registry.published(full_size.MODELS[name])
    config = getattr(small, family.name)()["transformer"].config
    narrow = {"_class_name": family.denoiser.class_name}
    narrow |= {key: value for key, value in config.items() if not key.startswith("_")}
    qwen3 = QWEN3 | {"num_hidden_layers": layers + 1}
    published = replace(published, denoiser=narrow, encoders={"text_encoder": qwen3})
    return Subject(family, published, layers=layers)


@pytest.mark.parametrize("name", LAYERS)
def test_all_stages_run_in_small(name, tmp_path, monkeypatch):
    monkeypatch.setattr(full_size, "SIDE", 64)
    subject, dtype = subject_of(name), DTYPES[name]
    found = {
        stage: full_size.run_stage(stage, subject, tmp_path, 1, dtype) for stage in full_size.STAGES
    }
    assert found["steps"]["dtype"] == str(dtype).removeprefix("torch.")
    assert found["load"]["logical_parameters"] == found["shards"]["parameters"]
    assert found["steps"]["default"]["steps"] == 1
    encoder = found["encoder"]
    assert encoder["encoder_load_peak_rss_gb"] <= encoder["encoder_peak_rss_gb"]
    assert set(full_size.summary(found)) == {
        "parameters",
        "load_peak_rss_gb",
        "step_peak_rss_gb",
        "memory_over_inference",
        "step_over_forwards",
        "encoder_peak_rss_gb",
        "encoder_peak_allowed_gb",
    }


def test_a_familys_figures_leave_the_others(tmp_path):
    record("families", "sd3", {"export_equal": True}, tmp_path)
    record("full_size", "zimage", {"parameters": 6}, tmp_path)
    file = record("families", "zimage", {"export_equal": False}, tmp_path)
    found = read_json(file)
    assert found["families"] == {"sd3": {"export_equal": True}, "zimage": {"export_equal": False}}
    assert found["full_size"] == {"zimage": {"parameters": 6}}
