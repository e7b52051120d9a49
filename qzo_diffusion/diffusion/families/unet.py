"""The parts that Stable Diffusion 1, 2 and XL share: a UNet of convolutions and attention.

Linear layers and 1x1 convolutions are quantized and tuned; other convolutions stay as they are.
Regions of a picture share the layers of several resolutions, so no layer has a loss of its own
patch.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qzo_diffusion.diffusion.families.family import Config, Shape
from qzo_diffusion.diffusion.objectives import TIMES

CLASS = "UNet2DConditionModel"
SCHEDULERS = (
    "EulerDiscreteScheduler",
    "PNDMScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "LCMScheduler",
)
# inputs of the whole model, a thousandth of its weights
SKIP = ("time_embedding", "add_embedding")


def level(options: Mapping[str, Any]) -> float:
    """Return the noise level of a call of the model."""
    time = options["timestep"]
    return float(time.flatten()[0] if isinstance(time, Tensor) else time) / TIMES


def shape(config: Config) -> Shape:
    """Return the sizes at the finest resolution, where a token is one latent.

    Gated feed-forwards and skip connections hold half as much again as the width says.
    """
    text_width = config["cross_attention_dim"]
    return Shape(
        width=config["block_out_channels"][0] * 3 // 2,
        latents=1,
        text_width=text_width if isinstance(text_width, int) else text_width[0],
        channels=config["in_channels"],
    )


def no_shift(scheduler: Any, tokens: int) -> float:
    return 1.0


def set_times(scheduler: Any, steps: int, tokens: int, device: torch.device) -> None:
    scheduler.set_timesteps(steps, device=device)
