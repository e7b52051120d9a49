"""Time and memory of a training step against plain inference: `OMP_NUM_THREADS=2 python -m
benchmarks.step_time`.

The floor of an estimate is as many inference forwards as it has probes, in the memory of inference.
Both are measured in one process, in turns, on the same quantized model, batch, dtype and threads;
ratios are for two probes of each example over two forwards of the batch. A step is everything from
the batch in hand to the journal's record. `dense` has one number per scale and one direction;
`probes` is the default: one per row and block column, eight directions of every example and, in
pictures, of each of 16 regions, as many probes in a forward as a run takes. `antithetic` has one
direction of every example, +eps and -eps in one forward. In texts a step reads from a file what the
blocks before the first trained one give; `probes_first_time` computes them. SmolLM2 is made by
`python -m benchmarks.smollm2`. Memory is the peak of the resident set (reset through
/proc/self/clear_refs) above what the process held after its imports, in a process that gives freed
buffers back at once. Inference is measured when steps were taken and their numbers dropped: code
that is loaded on first use, and what oneDNN keeps for every shape of a product that it has seen (5
MB on SmolLM2), are no step's memory."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.record import write_results
from benchmarks.resident import FREED_AT_ONCE, peak_of, resident
from benchmarks.smollm2 import smollm2
from qzo_diffusion import resources
from qzo_diffusion.core.journal import JournalWriter
from qzo_diffusion.core.noise import Direction
from qzo_diffusion.core.optimizer import Sgd
from qzo_diffusion.core.parametrization import Parametrization
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.core.probing import Probing, StepBatch
from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.diffusion.families.family import model_loss
from qzo_diffusion.diffusion.families.sd3 import SD3
from qzo_diffusion.diffusion.flow_matching import Batch, patches
from qzo_diffusion.llm.causal_lm import OUTPUT_HEAD, load_causal_lm
from qzo_diffusion.llm.kept_hidden import KeptHidden
from qzo_diffusion.llm.objectives import task_loss
from qzo_diffusion.llm.tasks import Example, encode, make_batch
from qzo_diffusion.quant.choose import last_readers, quiet
from qzo_diffusion.quant.load import find_scales, quantize_
from qzo_diffusion.runs.style.memory import rows_on_cpu
from qzo_diffusion.train import loop
from qzo_diffusion.train.checkpoint import entry_of

CASES = {  # name: (model, side of the latents, text tokens, batch)
    "tiny_b16": ("tiny", 8, 32, 16),
    "sd3_250m_b1": ("sd3_250m", 32, 154, 1),
    "sd3_250m_b4": ("sd3_250m", 32, 154, 4),
    "sd3_250m_b16": ("sd3_250m", 32, 154, 16),
    "smollm2_b4": ("smollm2", 0, 36, 4),
    "smollm2_b16": ("smollm2", 0, 36, 16),
}
REGIONS, DIRECTIONS, PROBES = 16, 8, 32  # PROBES: of a run's step


@dataclass
class Setup:
    """A model and a batch.

    drawn: the batch in parts of so many examples, as a step draws them, or as it does the first
    time. at_once: of how many examples all probes go into one forward. default: what a run trains
    where nothing is said."""

    model: nn.Module
    objective: Callable[[Any], torch.Tensor]
    batch: Any
    drawn: Callable[[int, bool], Sequence[Any]]
    at_once: int
    patch_groups: int
    default: Callable[[ScaleSet], Parametrization]


def set_up(case: str, dtype: torch.dtype) -> Setup:
    name, side, tokens, count = CASES[case]
    if name == "smollm2":
        return set_up_text(tokens, count, dtype)
    model = build_model(name, dtype)
    batch = replace(random_batch(model, side, tokens, count), patch_groups=REGIONS)
    apart = SD3.denoiser.own_patch([name for name, _ in model.named_modules()])

    def default(scales: ScaleSet) -> Parametrization:
        return parametrize(scales, "separable", token_wise=apart, last_readers=last_readers(scales))

    rows = rows_on_cpu(
        model.config.num_attention_heads * model.config.attention_head_dim,
        patches(batch.latents),
        dtype,
    )
    return Setup(
        model,
        lambda one: model_loss(SD3, model, one, dtype),
        batch,
        lambda size, _: batch.split(size),
        min(count, rows // DIRECTIONS),
        REGIONS,
        default,
    )


def set_up_text(tokens: int, count: int, dtype: torch.dtype) -> Setup:
    lm = load_causal_lm(smollm2(), dtype)
    quantize_(lm.model, skip=[OUTPUT_HEAD])
    text = (" and" * tokens)[: 4 * (tokens - 2)] + " It was"
    example = Example(text, (" terrible", " great"), 0, ("",), "here")

    encoded = encode(lm, [example] * count, None)
    trained = quiet(find_scales(lm.model))
    lm.part_before_(trained)
    rows = [row for one in encoded for row in one.rows]
    kept = KeptHidden(lm, [rows], Path(tempfile.mkdtemp()))

    def default(scales: ScaleSet) -> Parametrization:
        return parametrize(scales, "separable", trained=trained, last_readers=last_readers(scales))

    return Setup(
        lm.model,
        lambda one: task_loss(lm, one),
        make_batch(lm, encoded),
        lambda size, again: (
            [make_batch(lm, encoded[:size], kept if again else None)] * (count // size)
        ),
        count,
        1,
        default,
    )


def build_model(name: str, dtype: torch.dtype) -> Any:
    from diffusers import SD3Transformer2DModel

    if name == "tiny":
        model = SD3Transformer2DModel.from_pretrained(
            resources.tiny_model(), subfolder="transformer", dtype=dtype
        )
    else:
        model = SD3Transformer2DModel(
            sample_size=32,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=7,
            attention_head_dim=64,
            num_attention_heads=16,
            joint_attention_dim=1024,
            caption_projection_dim=1024,
            pooled_projection_dim=512,
            pos_embed_max_size=48,
            qk_norm="rms_norm",
        ).to(dtype)
    model = model.eval().requires_grad_(False)
    quantize_(model, skip=SD3.denoiser.skip)
    return model


def random_batch(model: Any, side: int, tokens: int, count: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(count, 16, side, side, generator=generator) for _ in range(2))
    embeds = torch.randn(count, tokens, model.config.joint_attention_dim, generator=generator)
    pooled = torch.randn(count, model.config.pooled_projection_dim, generator=generator)
    return Batch(latents, noise, torch.rand(count, generator=generator), embeds, pooled)


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(case: str, dtype_name: str, rounds: int) -> dict[str, Any]:
    imports = resident("VmRSS")
    setup = set_up(case, getattr(torch, dtype_name))
    objective, batch = setup.objective, setup.batch
    whole = replace(batch, patch_groups=1) if setup.patch_groups > 1 else batch
    parameters = sum(p.numel() for p in setup.model.parameters())

    @torch.no_grad()
    def two_forwards() -> None:
        objective(whole).sum().item()
        objective(whole).sum().item()

    scales = find_scales(setup.model)
    trained: dict[str, Parametrization] = {}
    count_steps = iter(range(10**9))
    journal = JournalWriter.create(Path(tempfile.mkdtemp()) / "journal.qzo", {})

    def start() -> None:
        trained.update(dense=parametrize(scales, "dense"), default=setup.default(scales))

    def one_step(of: str, probing: Probing, micro_batches: Sequence[Batch]) -> None:
        step_batch = StepBatch(
            micro_batches, patch_groups=setup.patch_groups if probing.per_example else 1
        )
        task = loop.Setup(
            objective, lambda _: step_batch, trained[of], Sgd(), probing, lambda _: 1e-6
        )
        record = loop.train_step_(task, step_batch, next(count_steps))
        journal.append(entry_of(record, 0))

    both_sides = Probing(0, 1e-2, per_example=True, normalize=True)
    default = replace(both_sides, num_directions=DIRECTIONS, estimator="leave_one_out")

    def dense() -> None:
        one_step("dense", Probing(0, 1e-2), [whole])

    def probes() -> None:
        one_step("default", default, setup.drawn(setup.at_once, True))

    def antithetic() -> None:
        one_step("default", both_sides, setup.drawn(len(batch), True))

    def probes_first_time() -> None:
        one_step("default", default, setup.drawn(setup.at_once, False))

    def probes_in_flight() -> None:
        """As many rows in flight as in an inference forward; in all as many as a run's step has."""
        probes_per_forward = min(DIRECTIONS, len(batch))
        one_step(
            "default",
            replace(default, probes_per_forward=probes_per_forward),
            setup.drawn(len(batch) // probes_per_forward, True)[: PROBES // len(batch)],
        )

    def draw_and_apply() -> None:
        """What a step does beside its forwards: two views and one update over all scales."""
        direction, theta = Direction(0, next(count_steps)), trained["dense"]
        for radius in (1e-2, -1e-2):
            view = theta.perturbed(direction, radius)
            assert view is not None
            for chunk in scales.chunks():
                view(chunk)
        theta.move_([direction], [1e-9])

    in_flight = (dense, probes_in_flight)
    start()
    for work in (*in_flight, two_forwards):  # with numbers that are then dropped
        work()
    trained.clear()
    inference_peak = peak_of(two_forwards)
    start()
    peaks = {}
    for work in in_flight:
        work()
        peaks[work.__name__] = peak_of(work)
    works: dict[str, Callable[[], None]] = {
        work.__name__: work for work in (two_forwards, dense, probes, antithetic)
    }
    if CASES[case][0] == "smollm2":
        works["probes_first_time"] = probes_first_time
    times: dict[str, list[float]] = {name: [] for name in [*works, "noise_and_update"]}
    antithetic()
    probes()
    for _ in range(rounds):
        for name, work in works.items():
            # a run takes steps of one kind: the first after another kind waits for pages that the
            # system took back
            work()
            times[name].append(seconds_of(work))
        times["noise_and_update"].append(seconds_of(draw_and_apply))
    for name in ("probes", "probes_first_time"):
        times[name] = [2 * seconds / DIRECTIONS for seconds in times.get(name, [])]
    medians = {name: statistics.median(values) for name, values in times.items() if values}

    def ratio(name: str) -> float:
        """The median over rounds, each against its own two forwards."""
        return round(
            statistics.median(
                s / f for s, f in zip(times[name], times["two_forwards"], strict=True)
            ),
            4,
        )

    return {
        "dense_over_two_forwards": ratio("dense"),
        "probes_over_two_forwards": ratio("probes"),
        "antithetic_over_two_forwards": ratio("antithetic"),
        **(
            {"probes_first_time_over_two_forwards": ratio("probes_first_time")}
            if "probes_first_time" in works
            else {}
        ),
        "dense_over_two_forwards_of_medians": round(medians["dense"] / medians["two_forwards"], 4),
        "probes_over_two_forwards_of_medians": round(
            medians["probes"] / medians["two_forwards"], 4
        ),
        "noise_and_update_over_two_forwards": round(
            medians["noise_and_update"] / medians["two_forwards"], 4
        ),
        "memory_over_inference": round((peaks["dense"] - imports) / (inference_peak - imports), 4),
        "probes_memory_over_inference": round(
            (peaks["probes_in_flight"] - imports) / (inference_peak - imports), 4
        ),
        "inference_peak_mb": round((inference_peak - imports) / 1e6),
        "step_peak_mb": round((peaks["dense"] - imports) / 1e6),
        "median_seconds": {name: round(value, 5) for name, value in medians.items()},
        "batch": len(batch),
        "dtype": dtype_name,
        "scales": scales.numel(),
        "stored_parameters": parameters,
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--case", choices=CASES, help="measure one case and print it (used by the whole run)"
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=list(CASES), help="leave the others out"
    )
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args.case, args.dtype, args.rounds)))
        return
    cases: dict[str, Any] = {}
    for case in args.cases:
        for dtype in ("float32", "bfloat16"):
            timed, held = (
                measured_apart(case, dtype, args.rounds, {}),
                measured_apart(case, dtype, 1, FREED_AT_ONCE),
            )
            cases[f"{case}_{dtype}"] = timed | {key: held[key] for key in MEMORY}
            print(f"{case}_{dtype}", cases[f"{case}_{dtype}"], file=sys.stderr)
    print(write_results("step_time", {"models": worst_by_model(cases), "cases": cases}))


MEMORY = (
    "memory_over_inference",
    "probes_memory_over_inference",
    "inference_peak_mb",
    "step_peak_mb",
)


def measured_apart(
    case: str, dtype: str, rounds: int, environment: dict[str, str]
) -> dict[str, Any]:
    """In a process of its own: the allocator of one case must not hide the peak of another."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.step_time",
        "--case",
        case,
        "--dtype",
        dtype,
        "--rounds",
        str(rounds),
    ]
    output = subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ | environment
    ).stdout
    return dict(json.loads(output.strip().splitlines()[-1]))


WORST_OF = (
    "dense_over_two_forwards",
    "probes_over_two_forwards",
    "memory_over_inference",
    "probes_memory_over_inference",
)


def worst_by_model(cases: dict[str, Any]) -> dict[str, Any]:
    """The highest of each ratio over the batch sizes and dtypes of a model."""
    models = dict.fromkeys(CASES[name.rpartition("_")[0]][0] for name in cases)
    return {
        model: {
            key: max(case[key] for name, case in cases.items() if name.startswith(f"{model}_"))
            for key in WORST_OF
        }
        for model in models
    }


if __name__ == "__main__":
    main()
