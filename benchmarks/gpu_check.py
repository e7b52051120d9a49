"""Does a GPU do what the CPU does? `python -m benchmarks.gpu_check`, under ten minutes, without a
download.

On a machine without one everything that needs none is run on the CPU and the rest is null.

    equal      z, the shown scales and an update, bit for bit those of the CPU
    forward    the embedded model in fp32 and bf16 against the CPU in fp32, alone and probed
    step       a dense step and one of the default over two plain forwards: on the clock, and by
               how long the card was busy
    memory     peak at 512 and 1024 px, batch 1, over that of a forward of as many examples

The last two are of Stable Diffusion 3.5 Large with random weights (--layers for less).
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.full_size.weights import status
from benchmarks.record import write_results
from benchmarks.resident import reset_peak
from benchmarks.sd35_full_size.model import batch_of, config_of
from qzo_diffusion.config.files import make_config
from qzo_diffusion.core.noise import Direction, directions_of_step
from qzo_diffusion.core.parametrization import tuned_scales
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.core.probing import StepBatch
from qzo_diffusion.diffusion.families.family import model_loss
from qzo_diffusion.diffusion.families.sd3 import SD3
from qzo_diffusion.diffusion.flow_matching import divisor_up_to, patches
from qzo_diffusion.diffusion.transformer import empty_transformer
from qzo_diffusion.quant.base import linears_to_quantize
from qzo_diffusion.quant.bnb import quantized_layer
from qzo_diffusion.quant.load import find_scales
from qzo_diffusion.resources import tiny_model
from qzo_diffusion.runs import build
from qzo_diffusion.runs.style import pipeline
from qzo_diffusion.train.loop import Setup, train_step_

CPU = torch.device("cpu")


def tiny(device: torch.device, dtype: torch.dtype) -> Any:
    config = build.Config(model="tiny")
    return pipeline.quantized_transformer(config, tiny_model(), device, dtype)


def equal(device: torch.device) -> dict[str, bool]:
    """Every level of numbers, moved by the same directions on both devices; integer codes too."""
    found = {}
    found |= {f"codes_{level}": _equal_codes(device, level) for level in ("codes", "separable")}
    for level in ("dense", "row", "column", "layer"):
        results = []
        for place in (CPU, device):
            theta = parametrize(find_scales(tiny(place, torch.float32)), level)  # type: ignore[arg-type]
            direction = Direction(7, 3)
            z = {name: theta.combined(name, [direction], [1.0]).cpu() for name in theta.templates()}
            for step in range(40):  # to many different numbers: a GPU's exp in fp32 is not a CPU's
                theta.move_([Direction(7, step)], [0.01 / (step + 1)])
            moved = {name: number.cpu().clone() for name, number in theta.state().items()}
            results.append(
                (z, moved, {name: scale.cpu() for name, scale in tuned_scales(theta).items()})
            )
        for what, one, other in zip(("z", "numbers", "scales"), *results, strict=True):
            found[f"{level}_{what}"] = all(torch.equal(one[name], other[name]) for name in one)
    return found


def _equal_codes(device: torch.device, level: str) -> bool:
    moved = []
    for place in (CPU, device):
        settings = {"model": "tiny", "method": "quzo", "qzo": {"parametrization": level}}
        config = make_config(settings)
        model = pipeline.quantized_transformer(config, tiny_model(), place, torch.float32)
        _, theta = build.scales_and_theta(config, model, own_patch=SD3.denoiser.own_patch)
        theta.move_([Direction(7, 3)], [0.3])
        moved.append({name: codes.cpu() for name, codes in tuned_scales(theta).items()})
    return all(torch.equal(tensor, moved[1][name]) for name, tensor in moved[0].items())


def forward(device: torch.device) -> dict[str, float]:
    """Relative distance of the prediction to that of the CPU in fp32: of the model, and as a step
    of the default probes it.
    """
    generator = torch.Generator().manual_seed(0)
    wanted = _predictions(CPU, torch.float32, generator.clone_state())
    figures = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, got in _predictions(device, dtype, generator.clone_state()).items():
            figures[f"{name}_{dtype}".replace("torch.", "")] = float(
                (got - wanted[name]).norm() / wanted[name].norm()
            )
    return figures


@torch.no_grad()
def _predictions(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Of two examples; where they are probed, of both at +eps and then at -eps, along 16 regions'
    directions each.
    """
    config = make_config({"model": "tiny"})
    model = pipeline.quantized_transformer(config, tiny_model(), device, dtype)
    inputs = {
        "hidden_states": torch.randn(2, 16, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(
            2, 32, model.config.joint_attention_dim, generator=generator
        ),
        "pooled_projections": torch.randn(
            2, model.config.pooled_projection_dim, generator=generator
        ),
        "timestep": torch.tensor([100.0, 800.0]),
    }
    moved = {
        name: value.to(device, dtype if name != "timestep" else None)
        for name, value in inputs.items()
    }
    found = {"plain": model(**moved).sample}
    scales, theta = build.scales_and_theta(config, model, own_patch=SD3.denoiser.own_patch)
    theta.move_([Direction(7, 3)], [0.01])
    with scales.override(
        *theta.probes(directions_of_step(7, 4, 2, "rademacher", 16), [0.03, -0.03])
    ):
        found["probed"] = model(
            **{name: torch.cat([value, value]) for name, value in moved.items()}
        ).sample
    return {name: prediction.float().cpu() for name, prediction in found.items()}


def random_model(layers: int, device: torch.device) -> Any:
    """The real architecture with random weights, quantized layer by layer on the device; nothing is
    read.
    """
    model: Any = empty_transformer(config_of(layers))
    generator = torch.Generator(device).manual_seed(0)
    for name, linear in list(linears_to_quantize(model, SD3.denoiser.skip, 64)):
        weight = (
            torch.randn(
                linear.weight.shape, generator=generator, device=device, dtype=torch.bfloat16
            )
            * 0.02
        )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, quantized_layer(weight, linear.bias, "nf4", 64))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            parent, _, child = name.rpartition(".")
            real = torch.zeros(tensor.shape, device=device, dtype=torch.bfloat16)
            module = model.get_submodule(parent)
            if child in module._buffers:
                module._buffers[child] = real
            else:
                module._parameters[child] = torch.nn.Parameter(real, requires_grad=False)
    return model.eval().requires_grad_(False)


def peak_gb(device: torch.device, work: Callable[[], object]) -> float:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() / 1e9
    reset_peak()
    work()
    return status("VmHWM")


STEPS = {
    "dense": (1, {"qzo": {"parametrization": "dense"}}),
    # +eps and -eps of an example in one forward
    "antithetic": (2, {"qzo": {"estimator": "antithetic"}}),
    "default_one_in_flight": (1, {}),
    "default": (8, {}),  # eight directions of an example in one forward
}
"""Name -> examples in flight, settings."""


def busy_seconds(work: Callable[[], object]) -> float | None:
    """How long the card was at work, whatever it waited for in between."""
    if not torch.cuda.is_available():
        return None
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True
    ) as found:
        work()
        torch.cuda.synchronize()
    on_card = [
        event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return round(sum(event.time_range.elapsed_us() for event in on_card) / 1e6, 4)


def step_and_memory(
    device: torch.device, layers: int, sides: list[int], rounds: int
) -> dict[str, Any]:
    """Of the steps of `STEPS`, each of a batch of one example; ratios are for two probes over two
    forwards.
    """
    model = random_model(layers, device)
    figures: dict[str, Any] = {"layers": layers}

    def objective(one: Any) -> torch.Tensor:
        return model_loss(SD3, model, one, torch.bfloat16)

    @torch.no_grad()
    def forward_of(batch: Any) -> None:
        objective(batch).sum().item()

    for side in sides:
        batch = batch_of(model, side).to(device)
        steps, pairs = {}, {}
        for name, (in_flight, settings) in STEPS.items():
            config = make_config(settings | {"train": {"lr": 1e-9, "micro_batch_size": in_flight}})
            steps[name] = step_of(model, objective, batch, config)
            pairs[name] = build.probes_of_example(config) / 2

        def two_forwards(batch: Any = batch) -> None:
            forward_of(batch)
            forward_of(batch)

        inference = {}
        for in_flight in sorted({in_flight for in_flight, _ in STEPS.values()}):
            examples = batch_of(model, side, in_flight).to(device)
            forward_of(examples)
            inference[in_flight] = peak_gb(device, lambda examples=examples: forward_of(examples))
        peaks = {name: peak_gb(device, step) for name, step in steps.items()}
        seconds = {
            name: clocked({"forwards": two_forwards, "step": step}, rounds)
            for name, step in steps.items()
        }
        busy = {
            name: busy_seconds(work) for name, work in {"forwards": two_forwards, **steps}.items()
        }
        figures[f"{side}px"] = {"two_forwards_busy_seconds": busy["forwards"]} | {
            name: {
                "step_over_two_forwards": round(over_two(seconds[name]) / pairs[name], 3),
                "pairs_of_forwards": pairs[name],
                "step_seconds": round(statistics.median(seconds[name]["step"]), 4),
                "step_busy_seconds": busy[name],
                "step_busy_over_two_forwards": round(busy[name] / busy["forwards"] / pairs[name], 3)
                if busy[name]
                else None,
                "step_peak_gb": round(peaks[name], 3),
                "inference_peak_gb": round(inference[STEPS[name][0]], 3),
            }
            for name in steps
        }
        print(side, figures[f"{side}px"], file=sys.stderr)
    return figures


def over_two(seconds: dict[str, list[float]]) -> float:
    """The median over rounds, each step against the forwards beside it."""
    return statistics.median(
        step / forwards for forwards, step in zip(seconds["forwards"], seconds["step"], strict=True)
    )


def clocked(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, one after the other in every round."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - started)
    return times


def step_of(
    model: Any, objective: Callable[[Any], torch.Tensor], batch: Any, config: build.Config
) -> Callable[[], object]:
    """A whole step of a run with this config; a further one at every call."""
    _, theta = build.scales_and_theta(config, model, own_patch=SD3.denoiser.own_patch)
    patch_groups = divisor_up_to(config.qzo.regions, patches(batch.latents))
    whole = StepBatch([replace(batch, patch_groups=patch_groups)], patch_groups=patch_groups)
    optimizer, probing, counted = build.optimizer(config), build.probing(config), iter(range(10**9))
    setup = Setup(objective, lambda _: whole, theta, optimizer, probing, lambda _: 1e-9)
    return lambda: train_step_(setup, whole, next(counted))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--layers", type=int, help="of the 38; by default all on a GPU and 1 on a CPU"
    )
    parser.add_argument(
        "--sides", type=int, nargs="+", help="pixels; by default 512 1024 on a GPU and 256 on a CPU"
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    layers, sides = args.layers or (38 if gpu else 1), args.sides or ([512, 1024] if gpu else [256])
    figures: dict[str, Any] = {
        "equal": equal(device),
        "forward": forward(device),
        "large": step_and_memory(device, layers, sides, args.rounds),
    }
    print(write_results("gpu_check", figures))


if __name__ == "__main__":
    main()
