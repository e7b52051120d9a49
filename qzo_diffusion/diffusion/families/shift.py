"""The time shift of rectified flow, which may grow with the number of tokens of a picture."""

import math
from typing import Any

import torch


def shift_options(scheduler: Any, tokens: int) -> dict[str, float]:
    """Return the arguments of `set_timesteps` for a picture with so many tokens."""
    return {"mu": _mu(scheduler, tokens)} if _is_dynamic(scheduler) else {}


def set_even_times(scheduler: Any, steps: int, tokens: int, device: torch.device) -> None:
    """Set steps from noise level 1 to 1 / `steps`, equally far from each other before the shift."""
    sigmas = [1 - step / steps for step in range(steps)]
    scheduler.set_timesteps(sigmas=sigmas, device=device, **shift_options(scheduler, tokens))


def flow_shift(scheduler: Any, tokens: int) -> float:
    """Return the shift of a picture with so many tokens, by the scheduler's config."""
    if _is_dynamic(scheduler):
        return math.exp(_mu(scheduler, tokens))
    return float(scheduler.config["shift"])


def _is_dynamic(scheduler: Any) -> bool:
    return bool(scheduler.config.get("use_dynamic_shifting"))


def _mu(scheduler: Any, tokens: int) -> float:
    """Return the logarithm of the shift, on a line through two sizes."""
    config = scheduler.config
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (high - low)
    return float(tokens * slope + config["base_shift"] - slope * low)
