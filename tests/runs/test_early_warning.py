"""A run whose losses are noise is warned in its first steps, on stderr, in one line."""

import pytest
import torch

from qzo_diffusion.runs.style import plan


@pytest.fixture
def noise(monkeypatch):
    generator = torch.Generator().manual_seed(1)

    def losses(_family, _transformer, batch, _dtype):
        return torch.rand(len(batch), batch.patch_groups, generator=generator)

    monkeypatch.setattr(plan, "model_loss", losses)


def test_a_run_of_noise_is_warned(train, noise, capsys):
    settings = ("qzo.num_directions=2", "data.batch_size=2", "train.calibrate_lr=false")
    assert train("--max-steps", 20, "train.checkpoint_every=0", *settings) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "carries no signal" in line]
    assert len(lines) == 1
