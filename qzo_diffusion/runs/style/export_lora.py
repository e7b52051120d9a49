"""Turn a run's change into a LoRA file, and measure what the rank costs.

Layers are named as peft and diffusers name them, `transformer.<layer>.lora_A.weight` (`unet.` for a
UNet), which ComfyUI reads as well. There is no alpha: the factors are used as they are."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qzo_diffusion import resources
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.core.hooks import Hooks
from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.diffusion.autoencoders import reduction
from qzo_diffusion.diffusion.encoded_prompt import stack_prompts
from qzo_diffusion.diffusion.families.family import Family
from qzo_diffusion.diffusion.flow_matching import Batch
from qzo_diffusion.diffusion.pointwise import lora_of
from qzo_diffusion.diffusion.prompts import read_prompt_file
from qzo_diffusion.quant.low_rank import LowRank, low_rank_changes, norm_kept
from qzo_diffusion.quant.weights import Pending
from qzo_diffusion.runs.style import pipeline
from qzo_diffusion.runs.style.choose_model import shipped_prompts

FILE = "pytorch_lora_weights.safetensors"  # the name that `load_lora_weights` looks for
LEVELS = (0.2, 0.4, 0.6, 0.8)  # noise levels at which forwards are compared
LARGEST_SIDE = 512  # pixels of the pictures at which they are


def compared_inputs(config: Config, runtime: pipeline.Runtime) -> Batch:
    """Noise of a fixed seed at `LEVELS`, under the shipped prompts: inputs of the forwards that are
    compared. Encoders are loaded for prompts that no run has encoded yet.
    """
    file = resources.find_file(shipped_prompts(runtime.folder, "grid"), "prompts")
    prompts = read_prompt_file(file, config.data.trigger).texts[: len(LEVELS)]
    encoded = pipeline.prompt_encoder(config, runtime.folder, runtime.device, runtime.dtype).encode(
        prompts
    )
    shape = pipeline.shape_of(config, runtime)
    pixels = min(config.data.resolution or shape.native_resolution, LARGEST_SIDE)
    side = pixels // reduction(shape.vae.config)
    channels = shape.family.denoiser.shape(shape.transformer.config).channels
    generator = torch.Generator().manual_seed(0)
    chosen = [encoded[prompts[at % len(prompts)]] for at in range(len(LEVELS))]
    return Batch(
        torch.randn(len(LEVELS), channels, side, side, generator=generator),
        torch.randn(len(LEVELS), channels, side, side, generator=generator),
        torch.tensor(LEVELS),
        *stack_prompts(chosen),
        objective=pipeline.objective_of(config, runtime.folder),
    )


def lora(
    transformer: nn.Module,
    family: Family,
    scales: ScaleSet,
    tuned: Mapping[str, Tensor],
    rank: int,
    inputs: Batch,
) -> tuple[dict[str, Pending], dict[str, Any]]:
    """Return the tensors of a LoRA file by name, and its figures.

    `rank` in the figures is the one of the file, `norm_kept` the share of the change's norm that
    it keeps, and `forward_error` the distance of the forward with the LoRA from the tuned one,
    over the distance of the base's: 0 is the tuned model, 1 as far off as the base.

    Args:
        scales: the live scales, which hold the base, before and after.
        inputs: see `compared_inputs`; on any device.

    Raises:
        ModelError: `tuned` is the base, so that there is nothing to write.
    """
    layers = low_rank_changes(transformer, scales, tuned, rank)
    if not layers:
        raise ModelError(
            "a run that changed no weight",
            "a tuned run, whose change can be written",
            "train it for a step or more",
        )
    tensors: dict[str, Pending] = {}
    for name, one in layers.items():
        own, down, up = lora_of(transformer, name, one.down.cpu(), one.up.cpu())
        tensors[f"{family.denoiser.part}.{own}.lora_A.weight"] = Pending.of(down)
        tensors[f"{family.denoiser.part}.{own}.lora_B.weight"] = Pending.of(up)
    figures = {
        "rank": next(iter(layers.values())).down.shape[0],
        "norm_kept": norm_kept(layers),
        "forward_error": _forward_error(transformer, family, scales, tuned, layers, inputs),
    }
    return tensors, figures


def in_words(figures: Mapping[str, Any]) -> str:
    """Describe the figures of `lora` in two sentences."""
    return (
        f"Rank {figures['rank']} keeps {figures['norm_kept']:.1%} of the norm of the change. A "
        f"forward pass is off by {figures['forward_error']:.1%} of the way from the base to the "
        "tuned model (0 %: the tuned model; 100 %: as far off as the base)."
    )


def _forward_error(
    transformer: nn.Module,
    family: Family,
    scales: ScaleSet,
    tuned: Mapping[str, Tensor],
    layers: Mapping[str, LowRank],
    inputs: Batch,
) -> float:
    base = _prediction(transformer, family, inputs)
    with scales.override(lambda names: {name: tuned[name].to(scales[name]) for name in names}):
        wanted = _prediction(transformer, family, inputs)
    with _added(transformer, layers):
        got = _prediction(transformer, family, inputs)
    way = float((wanted - base).norm())
    return float((got - wanted).norm()) / way if way else math.nan


@torch.no_grad()
def _prediction(transformer: nn.Module, family: Family, inputs: Batch) -> Tensor:
    """One example at a time, fp32 on the CPU."""
    first = next(transformer.parameters())
    dtype = next(one.dtype for one in transformer.parameters() if one.is_floating_point())
    parts = [part.to(first.device) for part in inputs.split(1)]
    return torch.cat([family.denoiser.predict(transformer, part, dtype).cpu() for part in parts])


@contextmanager
def _added(transformer: nn.Module, layers: Mapping[str, LowRank]) -> Iterator[None]:
    """While open, layers add their factors' product to their outputs, as peft does."""
    hooks = Hooks()

    def adding(one: LowRank) -> Any:
        def add(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            down, up = one.down.to(output), one.up.to(output)
            return output + args[0].to(output.dtype) @ down.T @ up.T

        return add

    try:
        for name, one in layers.items():
            hooks.after(transformer.get_submodule(name), adding(one))
        yield
    finally:
        hooks.remove()
