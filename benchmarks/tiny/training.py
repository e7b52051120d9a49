"""A small resumable loop for first-order training on the CPU, in one process or several.

Every step draws its randomness from (seed, step, rank) alone, so a run that was stopped and resumed
is the run that was not stopped. Checkpoints are safetensors, written aside and renamed; nothing is
pickled."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from benchmarks.tiny.ranks import Ranks

Step = Callable[[int, torch.Generator], Tensor]
Watch = Callable[[int], None]  # looks at the averaged weights, which the model holds meanwhile


@contextlib.contextmanager
def fast_cpu(bf16: bool) -> Iterator[None]:
    """Plain attention, and bf16 products where asked: the fused bf16 attention's backward is nine
    times slower.
    """
    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        yield


def bf16_is_faster(loss: Callable[[bool], Tensor]) -> bool:
    """Times a forward and backward pass of `loss(bf16)` each way, after one to warm up.

    With AMX bf16 wins; on a CPU with AVX-512 alone it took 1.4 to 1.6 times as long as fp32.
    """
    seconds = {}
    for bf16 in (False, True):
        loss(bf16).backward()
        began = time.perf_counter()
        loss(bf16).backward()
        seconds[bf16] = time.perf_counter() - began
    print(f"a pass takes {seconds[False]:.2f} s in fp32, {seconds[True]:.2f} s in bf16", flush=True)
    return seconds[True] < seconds[False]


def cosine_lr(step: int, total: int, peak: float, warmup: int = 100, floor: float = 0.02) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def step_generator(seed: int, step: int, ranks: Ranks) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step * ranks.count + ranks.rank)


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
            if param.requires_grad:
                param.copy_(tensors[f"ema.{name}"])
    model.eval()
    return step


@dataclass(frozen=True)
class Recipe:
    """steps: fixed at the start, since the rate's cosine ends there. checkpoint_seconds: between
    two checkpoints; each also calls the watch.
    """

    steps: int
    peak_lr: float
    weight_decay: float = 0.01
    ema_decay: float = 0.998
    seed: int = 0
    checkpoint_seconds: float = 300.0


class State:
    """Weights, their average and Adam's moments: all that a checkpoint holds."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names, self.params = list(trained), list(trained.values())
        self.average = [p.detach().clone() for p in self.params]
        self.optimizer = torch.optim.AdamW(
            self.params,
            lr=recipe.peak_lr,
            weight_decay=recipe.weight_decay,
            betas=(0.9, 0.99),
            fused=True,
        )

    def update_(self, rate: float, ema_decay: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        torch._foreach_lerp_(self.average, self.params, 1 - ema_decay)

    def save(self, path: Path, step: int) -> None:
        tensors = {}
        for name, param, average in zip(self.names, self.params, self.average, strict=True):
            moments = self.optimizer.state[param]
            tensors[f"model.{name}"] = param.detach()
            tensors[f"ema.{name}"] = average
            tensors[f"exp_avg.{name}"] = moments["exp_avg"]
            tensors[f"exp_avg_sq.{name}"] = moments["exp_avg_sq"]
        _save(path, tensors, step)

    @torch.no_grad()
    def load_(self, path: Path) -> int:
        tensors, step = _load(path)
        for name, param, average in zip(self.names, self.params, self.average, strict=True):
            param.copy_(tensors[f"model.{name}"])
            average.copy_(tensors[f"ema.{name}"])
            self.optimizer.state[param] = {
                "step": torch.tensor(float(step)),
                "exp_avg": tensors[f"exp_avg.{name}"],
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"],
            }
        return step

    @torch.no_grad()
    def swap_(self) -> None:
        """Exchange weights and averaged weights."""
        for param, average in zip(self.params, self.average, strict=True):
            kept = param.clone()
            param.copy_(average)
            average.copy_(kept)


class Progress:
    """A bar with the mean loss of late, the rate of learning, and the time of day it will end."""

    def __init__(self, name: str, first: int, total: int, shown: bool) -> None:
        self._bar = tqdm(
            initial=first, total=total, desc=name, mininterval=20, disable=not shown, ascii=True
        )
        self._began, self._first, self._total = time.time(), first, total
        self._loss: float | None = None

    def __call__(self, step: int, loss: float, rate: float) -> None:
        self._loss = loss if self._loss is None else 0.98 * self._loss + 0.02 * loss
        each = (time.time() - self._began) / (step + 1 - self._first)
        ending = time.localtime(time.time() + each * (self._total - step - 1))
        self._bar.set_postfix_str(
            f"loss={self._loss:.4f} lr={rate:.1e} ends={time.strftime('%H:%M', ending)}",
            refresh=False,
        )
        self._bar.update()


def train_resumable(
    model: nn.Module,
    loss_of_step: Step,
    recipe: Recipe,
    *,
    checkpoint: Path,
    watch: Watch | None = None,
    ranks: Ranks | None = None,
) -> nn.Module:
    """Minimise `loss_of_step(step, generator)` and leave the averaged (EMA) weights in `model`."""
    ranks, state = ranks or Ranks(), State(model, recipe)
    first = state.load_(checkpoint) if checkpoint.exists() else 0

    def keep(step: int) -> None:
        state.save(checkpoint, step)
        if watch is not None:
            state.swap_()
            model.eval()
            watch(step)
            model.train()
            state.swap_()

    model.train()
    progress, last_save = Progress(checkpoint.stem, first, recipe.steps, ranks.first), time.time()
    for step in range(first, recipe.steps):
        model.zero_grad(set_to_none=True)
        loss = loss_of_step(step, step_generator(recipe.seed, step, ranks))
        loss.backward()
        ranks.average_([p.grad for p in state.params if p.grad is not None])
        rate = cosine_lr(step, recipe.steps, recipe.peak_lr)
        state.update_(rate, min(recipe.ema_decay, (1 + step) / (10 + step)))
        progress(step, loss.item(), rate)
        due = time.time() - last_save > recipe.checkpoint_seconds or step + 1 == recipe.steps
        if due and ranks.first:
            keep(step + 1)
        if due:
            last_save = time.time()
    state.swap_()
    return model.eval()
