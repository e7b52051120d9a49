"""The check for GPUs at least runs, and finds a CPU equal to itself."""

import torch

from benchmarks import gpu_check
from benchmarks.sd35_full_size import model
from benchmarks.sd35_full_size.model import LARGE

NARROW = {
    "num_layers": 1,
    "sample_size": 16,
    "pos_embed_max_size": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 256,
    "caption_projection_dim": 256,
    "pooled_projection_dim": 128,
}


def test_a_cpu_equals_itself(pipeline, monkeypatch):
    monkeypatch.setattr(gpu_check, "tiny_model", lambda: pipeline)
    found = gpu_check.equal(torch.device("cpu"))
    assert len(found) == 4 * 3 + 2
    assert all(found.values()), found


def test_steps_over_the_architecture_are_measured(monkeypatch):
    """Stable Diffusion 3.5 Large's, narrower and with short prompts."""
    monkeypatch.setattr(model, "T5_TOKENS", 8)
    monkeypatch.setattr(model, "CLIP_TOKENS", 8)
    monkeypatch.setattr(gpu_check, "config_of", lambda layers: LARGE | NARROW)
    found = gpu_check.step_and_memory(torch.device("cpu"), 1, [32], rounds=1)["32px"]
    pairs = {name: found[name]["pairs_of_forwards"] for name in gpu_check.STEPS}
    assert pairs == {"dense": 1, "antithetic": 1, "default_one_in_flight": 4, "default": 4}
    for name in gpu_check.STEPS:
        assert found[name]["step_over_two_forwards"] > 0
        assert found[name]["step_peak_gb"] > 0.1
        assert found[name]["inference_peak_gb"] > 0.1
        assert found[name]["step_busy_seconds"] is None  # no card
