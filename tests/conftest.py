"""Every test runs offline, on few threads and from the same random state, whatever ran before it."""

import os

# Read when the libraries are imported, so it has to stand above them.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")

import hypothesis
import pytest
import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
hypothesis.settings.register_profile("house", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("house")


@pytest.fixture(autouse=True)
def _global_random_state(request):
    """Building a layer draws from torch's global generator, which is fine; seeding it is not, ours or a library's."""
    state, seed = torch.get_rng_state(), torch.initial_seed()
    yield
    seeded = torch.initial_seed() != seed
    torch.set_rng_state(state)
    if seeded and not request.node.get_closest_marker("global_rng"):
        pytest.fail("torch's global random generator was seeded; pass a torch.Generator, or mark the test global_rng")


@pytest.fixture
def global_rng_untouched():
    """For code that promises not even to draw from torch's global generator."""
    state = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), state), "torch's global random generator was drawn from or seeded"
