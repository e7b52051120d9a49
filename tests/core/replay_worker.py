"""Replays journals with every optimizer on dense and row numbers and prints hashes of the results,
for test_portable_replay.py.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from qzo_diffusion.core.journal import Journal, JournalWriter, read_journal, replay_
from qzo_diffusion.core.journal_format import StepEntry
from qzo_diffusion.core.optimizer import make_optimizer
from qzo_diffusion.core.parametrization import tuned_scales
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.core.scales import ScaleSet

LAYERS = {
    "wide": (33, 31),
    "one": (1, 7),
    "tall": (257, 4),
    "big": (192, 96),
}  # rows, blocks a row: vectors with and without a rest
CASES = [
    (level, optimizer, 32)
    for level in ("dense", "row")
    for optimizer in ("sgd", "momentum", "adam")
] + [("dense", "momentum", 4), ("dense", "adam", 8), ("dense", "adam", 3)]  # bits of the state
STEPS = 40


class Layer(nn.Module):
    """A handle of itself, with scales that no version of torch draws differently."""

    def __init__(self, name: str, rows: int, blocks: int, words: np.random.Philox) -> None:
        super().__init__()
        self.name, self.out_features = name, rows
        self.scales = torch.from_numpy(
            (words.random_raw(rows * blocks) >> 11).astype(np.float64) * 2.0**-53 + 0.5
        ).float()

    @property
    def module(self) -> nn.Module:
        return self

    def override(self, scales: torch.Tensor) -> None:
        self.scales = scales


def write_journal(path: Path, directions: int) -> None:
    """Steps whose scalars have nothing round about them; one was skipped."""
    words = np.random.Philox(key=7)
    writer = JournalWriter.create(path, {"directions": "rademacher"})
    for step in range(STEPS):
        grads = tuple(float(word >> 11) * 2.0**-53 - 0.4 for word in words.random_raw(directions))
        writer.append(
            StepEntry(step, 11, 3e-3 / (step + 1) ** 0.5, 1e-2, 2.5, grads, skipped=step == 9)
        )
    writer.close()


def hashes(journal: Journal) -> dict[str, str]:
    found = {}
    for level, optimizer, bits in CASES:
        words = np.random.Philox(key=3)
        scales = ScaleSet(
            [Layer(name, rows, blocks, words) for name, (rows, blocks) in LAYERS.items()]
        )
        theta = parametrize(scales, level)
        made = make_optimizer(optimizer, state_bits=bits)
        assert replay_(journal, theta, made) == STEPS
        for what, tensors in (("numbers", theta.state()), ("scales", tuned_scales(theta))):
            content = b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))
            found[f"{level} {optimizer} {bits} {what}"] = hashlib.blake2b(
                content, digest_size=16
            ).hexdigest()
    return found


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # also more than there are processors
    facts = {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(facts | {file: hashes(read_journal(Path(file))) for file in sys.argv[1:]}))
