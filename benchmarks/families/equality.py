"""Compare our calls of a family's denoiser with those that its plain diffusers pipeline makes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.families.small import LENGTH, LENGTHS, SIDE
from qzo_diffusion.diffusion.cache import TensorCache
from qzo_diffusion.diffusion.families.family import Family
from qzo_diffusion.diffusion.flow_matching import Batch
from qzo_diffusion.diffusion.model_folder import load_scheduler
from qzo_diffusion.diffusion.objectives import Objective
from qzo_diffusion.diffusion.prompt_encoder import PromptEncoder

CPU = torch.device("cpu")
PROMPT = "a red apple"
STEPS = 3
ROUNDINGS = 8  # of the largest number
LATENTS = ("hidden_states", "sample", "sample.0")


@dataclass
class Call:
    """A call of a denoiser: tensors by the names of its arguments, and its output."""

    given: dict[str, Tensor]
    output: Tensor


class Given:
    """An objective whose latents are noisy already."""

    def __init__(self, own: Objective) -> None:
        self._own = own

    def noisy(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return latents

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


@contextmanager
def recorded(denoiser: nn.Module) -> Iterator[list[Call]]:
    calls: list[Call] = []

    def record(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        found = dict(zip(("sample", "timestep", "prompt"), args, strict=False)) | named
        output = out[0] if isinstance(out[0], Tensor) else torch.stack(out[0])
        calls.append(Call(dict(_tensors(found)), output.clone()))

    handle = denoiser.register_forward_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def _tensors(named: Mapping[str, Any], inside: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in named.items():
        if isinstance(value, Tensor):
            yield inside + name, value.clone()
        elif isinstance(value, Mapping):
            yield from _tensors(value, f"{name}.")
        elif isinstance(value, list):
            yield from _tensors({str(at): one for at, one in enumerate(value)}, f"{name}.")


def plain_calls(folder: Path, family: Family, dtype: torch.dtype) -> tuple[nn.Module, list[Call]]:
    """Draw a picture by the plain pipeline and return its denoiser with all calls of it."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder).to(dtype)
    pipeline.set_progress_bar_config(disable=True)
    denoiser = getattr(pipeline, family.denoiser.part)
    # as a run reads it: the tokenizer's own limit
    limit = LENGTHS.get(family.name, LENGTH)
    length = {"max_sequence_length": limit} if family.texts.large else {}
    with torch.no_grad(), recorded(denoiser) as calls:
        pipeline(
            prompt=PROMPT,
            height=SIDE,
            width=SIDE,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **{family.sampling.guidance_argument: family.sampling.unguided},
            **length,
        )
    return denoiser, calls


def our_call(
    folder: Path, family: Family, denoiser: nn.Module, cache: Path, call: Call
) -> tuple[Call, Tensor]:
    """Call the denoiser as training does, for the noisy latents and the time of a call."""
    latents = _latents(call)
    dtype = latents.dtype
    encoder = PromptEncoder(folder, TensorCache(cache), family=family, device=CPU, dtype=dtype)
    prompt = encoder.encode([PROMPT])[PROMPT]
    objective = Given(family.objective(load_scheduler(folder, family)))
    level = torch.tensor([family.denoiser.level(call.given)], dtype=torch.float64)
    if not call.given["timestep"].is_floating_point() or "sample" in call.given:
        level += 0.0005  # the middle of a step
    batch = Batch(latents, latents, level, prompt.embeds[None], prompt.pooled[None])
    batch = replace(batch, objective=objective)
    with torch.no_grad(), recorded(denoiser) as calls:
        prediction = family.denoiser.predict(denoiser, batch, dtype)
    return calls[0], prediction


def _latents(call: Call) -> Tensor:
    """Return the noisy latents [1, C, h, w] of a call."""
    first = next(call.given[name] for name in LATENTS if name in call.given)
    if "hidden_states" in call.given and first.dim() == 3:
        from qzo_diffusion.diffusion.families.packing import unpacked

        return unpacked(first, SIDE // 16, SIDE // 16)
    return first if "sample.0" not in call.given else first.squeeze(1)[None]  # [C, 1, h, w]


def differences(plain: Call, ours: Call) -> list[str]:
    """Return the names of arguments that differ, and "output" if the outputs do.

    The time is compared in fp32, in which every denoiser reads it. Where its last bits of float64
    differ, outputs do by a few roundings. Prompts of different lengths may differ by as much: the
    plain pipeline encodes them with padding.
    """
    wrong = [
        name
        for name, tensor in plain.given.items()
        if name not in ours.given or not _equal(name, tensor, ours.given[name])
    ]
    return [*wrong, *([] if _close(plain.output, ours.output) else ["output"])]


def _equal(name: str, one: Tensor, other: Tensor) -> bool:
    if name == "timestep":
        one, other = (tensor.reshape(-1)[:1].float() for tensor in (one, other))
    if name.startswith("prompt."):
        return one.shape == other.shape and _close(one, other)
    return bool(torch.equal(one, other))


def _close(one: Tensor, other: Tensor) -> bool:
    roundings = ROUNDINGS * torch.finfo(one.dtype).eps * float(one.abs().max())
    return torch.allclose(one, other, rtol=0, atol=roundings)


def clean_from_one_step(folder: Path, family: Family, level: float) -> float:
    """Return the largest error of the latents that a scheduler's step to noise level 0 gives, where
    the prediction is the true target.
    """
    from diffusers import EulerDiscreteScheduler

    generator = torch.Generator().manual_seed(1)
    latents, noise = (torch.randn(1, 4, 4, 4, generator=generator) for _ in range(2))
    scheduler = load_scheduler(folder, family)
    objective = family.objective(scheduler)
    if "beta_schedule" in scheduler.config:
        time = int(level * len(objective.products))  # type: ignore[attr-defined]
        euler = EulerDiscreteScheduler.from_config(
            scheduler.config, timestep_spacing="linspace", steps_offset=0
        )
        euler.set_timesteps(timesteps=[time])
        sigma = torch.tensor([(time + 0.5) / len(objective.products)])  # type: ignore[attr-defined]
        wide = latents + euler.sigmas[0] * noise  # as the sampler keeps it
        noisy = objective.noisy(latents, noise, sigma)
        scaled = euler.scale_model_input(wide, euler.timesteps[0])
        torch.testing.assert_close(scaled, noisy, rtol=1e-5, atol=1e-5)
        target = objective.target(latents, noise, sigma)
        found = euler.step(target, euler.timesteps[0], wide).prev_sample
    else:
        scheduler.set_timesteps(sigmas=[level], mu=0.0)
        sigma = scheduler.sigmas[:1]
        noisy = objective.noisy(latents, noise, sigma)
        target = objective.target(latents, noise, sigma)
        found = scheduler.step(target, scheduler.timesteps[0], noisy).prev_sample
    return float((found - latents).abs().max())
