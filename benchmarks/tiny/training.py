"""A small resumable loop for first-order training on the CPU.

Every step draws its randomness from (seed, step) alone, so a run that was stopped and resumed is
the run that was not stopped. Checkpoints are safetensors, written aside and renamed; nothing is
pickled."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

Step = Callable[[int, torch.Generator], Tensor]


@contextlib.contextmanager
def fast_cpu(enabled: bool = True) -> Iterator[None]:
    """bf16 products (AMX where there is one) with plain attention: the fused bf16 attention's
    backward is nine times slower.
    """
    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        yield


def cosine_lr(step: int, total: int, peak: float, warmup: int = 100, floor: float = 0.02) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def _save(path: Path, tensors: dict[str, Tensor], step: int) -> None:
    aside = path.with_suffix(".partial")
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        aside,
        metadata={"step": str(step)},
    )
    os.replace(aside, path)


def _load(path: Path) -> tuple[dict[str, Tensor], int]:
    with safe_open(path, "pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        return tensors, int(handle.metadata()["step"])


def load_average(model: nn.Module, checkpoint: Path) -> int:
    """Put a checkpoint's averaged weights into `model`; returns the step it was written at."""
    tensors, step = _load(checkpoint)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(tensors[f"ema.{name}"])
    model.eval()
    return step


def train_resumable(
    model: nn.Module,
    loss_of_step: Step,
    *,
    checkpoint: Path,
    total_steps: int,
    peak_lr: float,
    weight_decay: float = 0.01,
    ema_decay: float = 0.998,
    seed: int = 0,
    checkpoint_seconds: float = 120.0,
) -> nn.Module:
    """Minimise `loss_of_step(step, generator)` and leave the averaged (EMA) weights in `model`."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    params = [p for p in model.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(
        params, lr=peak_lr, weight_decay=weight_decay, betas=(0.9, 0.99), fused=True
    )
    first = 0
    if checkpoint.exists():
        tensors, first = _load(checkpoint)
        with torch.no_grad():
            for index, name in enumerate(names):
                params[index].copy_(tensors[f"model.{name}"])
                average[index].copy_(tensors[f"ema.{name}"])
                optimizer.state[params[index]] = {
                    "step": torch.tensor(float(first)),
                    "exp_avg": tensors[f"exp_avg.{name}"],
                    "exp_avg_sq": tensors[f"exp_avg_sq.{name}"],
                }

    def snapshot(step: int) -> None:
        tensors = {}
        for index, name in enumerate(names):
            state = optimizer.state[params[index]]
            tensors[f"model.{name}"] = params[index].detach()
            tensors[f"ema.{name}"] = average[index]
            tensors[f"exp_avg.{name}"] = state["exp_avg"]
            tensors[f"exp_avg_sq.{name}"] = state["exp_avg_sq"]
        _save(checkpoint, tensors, step)

    model.train()
    last_save, running = time.monotonic(), None
    bar = tqdm(
        range(first, total_steps),
        initial=first,
        total=total_steps,
        desc=checkpoint.stem,
        mininterval=20,
    )
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, total_steps, peak_lr)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        loss = loss_of_step(step, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, params, 1 - min(ema_decay, (1 + step) / (10 + step)))
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        bar.set_postfix(loss=f"{running:.4f}", refresh=False)
        if time.monotonic() - last_save > checkpoint_seconds:
            snapshot(step + 1)
            last_save = time.monotonic()
    if first < total_steps:
        snapshot(total_steps)
    with torch.no_grad():
        for param, mean in zip(params, average, strict=True):
            param.copy_(mean)
    return model.eval()
