"""Training on `tiny` against replaying its journal: `OMP_NUM_THREADS=1 python -m
benchmarks.replay_speed`.

For each kind of numbers and each optimizer a run of real steps writes its journal, and then the
journal is replayed from the base model; both are timed in turns, on one thread and without the
loading of the model, which is the same for both. The replayed numbers must be those of the run, bit
for bit."""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import write_results
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.journal import JournalWriter, read_journal, replay_
from qzo_diffusion.core.probing import StepBatch
from qzo_diffusion.diffusion.families.family import model_loss
from qzo_diffusion.diffusion.families.sd3 import SD3
from qzo_diffusion.diffusion.flow_matching import Batch
from qzo_diffusion.runs import build
from qzo_diffusion.runs.style import pipeline
from qzo_diffusion.train.checkpoint import entry_of
from qzo_diffusion.train.loop import Setup, train

BATCH, TOKENS, SIDE = 16, 32, 8
CASES = {  # name: (parametrization, optimizer, directions, one for every example)
    "layer_sgd": ("layer", "sgd", 1, False),
    "row_sgd": ("row", "sgd", 1, False),
    "row_adam": ("row", "adam", 1, False),
    "row_sgd_per_example": ("row", "sgd", 1, True),
    "dense_sgd": ("dense", "sgd", 1, False),
    "dense_momentum": ("dense", "momentum", 1, False),
    "dense_adam": ("dense", "adam", 1, False),
    "dense_sgd_4_directions": ("dense", "sgd", 4, False),
}


def settings(case: str) -> Config:
    config = Config(model="tiny")
    (
        config.qzo.parametrization,
        config.train.optimizer,
        config.qzo.num_directions,
        config.qzo.per_example,
    ) = CASES[case]  # type: ignore[assignment]
    config.qzo.estimator = "antithetic"
    return config


def measure(case: str, steps: int, rounds: int, folder: Path) -> dict[str, Any]:
    config = settings(case)
    transformer, scales, theta = pipeline.load_base(config, pipeline.find_runtime(config))
    base = {name: tensor.clone() for name, tensor in scales.tensors().items()}
    state = {name: tensor.clone() for name, tensor in theta.state().items()}
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(BATCH, 16, SIDE, SIDE, generator=generator) for _ in range(2))
    embeds = torch.randn(BATCH, TOKENS, transformer.config.joint_attention_dim, generator=generator)  # type: ignore[union-attr]
    pooled = torch.randn(BATCH, transformer.config.pooled_projection_dim, generator=generator)  # type: ignore[union-attr]
    batch = Batch(latents, noise, torch.rand(BATCH, generator=generator), embeds, pooled)

    def go_back() -> None:
        for name, tensor in base.items():
            scales[name].copy_(tensor)
        theta.load_state_(state)

    def training(journal: Path) -> float:
        go_back()
        optimizer, schedule = build.optimizer(config), build.schedule(config)
        writer = JournalWriter.create(journal, {"directions": config.qzo.directions})
        began = time.perf_counter()
        setup = Setup(
            lambda one: model_loss(SD3, transformer, one, torch.float32),
            lambda step: StepBatch([batch]),
            theta,
            optimizer,
            build.probing(config),
            schedule,
        )
        train(
            setup,
            max_steps=steps,
            on_step=lambda record: writer.append(entry_of(record, config.train.seed)),
        )
        writer.close()
        return time.perf_counter() - began

    def replaying(journal: Path) -> float:
        go_back()
        optimizer = build.optimizer(config)
        began = time.perf_counter()
        replay_(read_journal(journal), theta, optimizer)
        return time.perf_counter() - began

    trained, replayed, equal, sizes = [], [], True, []
    for turn in range(rounds + 1):  # the first one warms up
        journal = folder / f"{case}_{turn}.qzo"
        seconds = training(journal)
        right = {name: tensor.clone() for name, tensor in theta.state().items()}
        again = statistics.median(replaying(journal) for _ in range(3))
        equal &= all(torch.equal(right[name], tensor) for name, tensor in theta.state().items())
        if turn:
            trained.append(seconds / steps)
            replayed.append(again / steps)
            sizes.append(journal.stat().st_size)
    shares = [two / one for one, two in zip(trained, replayed, strict=True)]
    return {
        "replay_over_training": round(statistics.median(shares), 5),
        "times_faster": round(1 / statistics.median(shares), 1),
        "ms_per_step": {
            "training": round(1e3 * statistics.median(trained), 3),
            "replay": round(1e3 * statistics.median(replayed), 3),
        },
        "equal_bit_for_bit": equal,
        "journal_bytes_per_step": round(statistics.median(sizes) / steps, 1),
        "trained_numbers": sum(tensor.numel() for tensor in theta.templates().values()),
        "batch": BATCH,
        "steps": steps,
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in args.cases:
            found[case] = measure(case, args.steps, args.rounds, Path(folder))
            print(case, json.dumps(found[case]), flush=True)
    worst = max(found, key=lambda case: found[case]["replay_over_training"])
    print(
        write_results(
            "replay",
            {
                "worst_case": worst,
                "times_faster_at_least": found[worst]["times_faster"],
                "cases": found,
            },
        )
    )


if __name__ == "__main__":
    main()
