"""Stage steps: memory and time of a step against two plain forwards."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.full_size.weights import status
from benchmarks.resident import reset_peak
from qzo_diffusion.diffusion.families.family import Family
from qzo_diffusion.diffusion.flow_matching import Batch

DEFAULT: dict[str, dict[str, Any]] = {"default": {}}
# Rademacher signs without momentum
DENSE: dict[str, Any] = {"qzo": {"parametrization": "dense", "num_directions": 1}}
METHODS = DEFAULT | {"dense": DENSE}


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def steps_of(
    family: Family,
    load: Callable[[], nn.Module],
    batch_of: Callable[[Any], Batch],
    count: int,
    methods: Mapping[str, dict[str, Any]] = METHODS,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """Inference first, then `count` steps of each method in the same process.

    Args:
        load: loads the denoiser; everything is imported before it.
        batch_of: makes one example for the model.
        methods: settings by name.
        dtype: that the denoiser runs in.
    """
    import tempfile

    from qzo_diffusion.config.files import make_config
    from qzo_diffusion.core.journal import JournalWriter
    from qzo_diffusion.core.probing import StepBatch
    from qzo_diffusion.diffusion.families.family import model_loss
    from qzo_diffusion.diffusion.flow_matching import divisor_up_to, patches
    from qzo_diffusion.runs import build
    from qzo_diffusion.train.checkpoint import entry_of
    from qzo_diffusion.train.loop import Setup, train_step_

    imports = status("VmRSS")
    model = load()
    batch = batch_of(model)

    def objective(one: Any) -> Tensor:
        return model_loss(family, model, one, dtype)

    @torch.no_grad()
    def two_forwards() -> None:
        objective(batch).sum().item()
        objective(batch).sum().item()

    two_forwards()
    loaded_peak = status("VmHWM")
    reset_peak()
    forwards = [timed(two_forwards)]
    inference_peak = status("VmHWM")
    figures: dict[str, Any] = {
        "inference_peak_rss_gb": round(inference_peak, 3),
        "loaded_peak_rss_gb": round(loaded_peak, 3),
    }
    for name, settings in methods.items():
        # What this file proves is memory and time, so no step moves a scale further than rounding.
        config = make_config(settings | {"train": {"lr": 1e-9, "micro_batch_size": 1}})
        _, theta = build.scales_and_theta(config, model, own_patch=family.denoiser.own_patch)
        wanted = config.qzo.regions if family.denoiser.token_wise else 1
        patch_groups = divisor_up_to(wanted, patches(batch.latents))
        mine = replace(batch, patch_groups=patch_groups)
        optimizer, probing, pairs = (
            build.optimizer(config),
            build.probing(config),
            build.probes_of_example(config) / 2,
        )
        whole = StepBatch([mine], patch_groups=patch_groups)
        setup = Setup(
            objective, lambda _, batch=whole: batch, theta, optimizer, probing, lambda _: 1e-9
        )
        times: list[float] = []
        ratios: list[float] = []
        with tempfile.TemporaryDirectory() as place:
            journal = JournalWriter.create(Path(place) / "journal.qzo", {})
            reset_peak()
            for step in range(count):
                started = time.perf_counter()
                record = train_step_(setup, whole, step)
                journal.append(entry_of(record, 0))
                times.append(time.perf_counter() - started)
                if step == 0:
                    peak = status("VmHWM")
                peak = max(peak, status("VmHWM"))
                forwards.append(timed(two_forwards))
                ratios.append(times[-1] / forwards[-1] / pairs)
            journal.close()
        figures[name] = {
            "step_peak_rss_gb": round(peak, 3),
            "memory_over_inference": round(peak / inference_peak, 4),
            "memory_over_inference_above_imports": round(
                (peak - imports) / (inference_peak - imports), 4
            ),
            "step_over_two_forwards": round(statistics.median(ratios), 4),
            "step_seconds": round(statistics.median(times), 2),
            "steps": count,
            "pairs_of_forwards": pairs,
        }
        del theta, optimizer
        print(name, figures[name], file=sys.stderr)
    figures["two_forwards_seconds"] = round(statistics.median(forwards), 2)
    for key in ("step_peak_rss_gb", "memory_over_inference", "step_over_two_forwards"):
        figures[key] = max(figures[name][key] for name in methods)  # the worst
    figures["step_peak_rss_gb"] = max(figures["step_peak_rss_gb"], round(loaded_peak, 3))
    return figures
