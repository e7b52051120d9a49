"""The cost of a QuZO step and the noise of its directions, for `python -m benchmarks.quzo`."""

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.llm_compare.methods import METHODS, TASKS, Places
from qzo_diffusion.core.grouped import Grouped
from qzo_diffusion.core.noise import Direction, directions_of_step, torch_generator
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.core.probes import repeated
from qzo_diffusion.core.probing import Probing
from qzo_diffusion.core.quzo import Codes
from qzo_diffusion.core.rounded_codes import RoundedCodes
from qzo_diffusion.core.spsa import probe
from qzo_diffusion.quant.intgrid import IntGridLinear

EPS = (0.1, 0.25, 0.5, 1.0, 2.0)  # in codes
BATCH = 16
Shown = Callable[[int, float], Any]
"""Draw and radius -> a context in which layers are probed."""


@dataclass(frozen=True)
class Case:
    """A model of a cell with one batch, and its plan."""

    plan: Any
    base: Any
    batches: Any

    def losses(self) -> Tensor:
        """One loss for each of the first batch's examples, float64."""
        from qzo_diffusion.llm.objectives import task_loss

        with torch.no_grad():
            return task_loss(self.base.lm, self.batches(0).micro_batches[0]).double()


def load(places: Places, cell: str, *settings: str, batch: int = BATCH) -> Case:
    from qzo_diffusion.config.defaults import set_dotted
    from qzo_diffusion.config.files import make_config, parse_override
    from qzo_diffusion.config.llm import LlmConfig
    from qzo_diffusion.llm.tasks import encode
    from qzo_diffusion.runs.llm import plan as llm_run
    from qzo_diffusion.runs.llm.batches import TextBatches
    from qzo_diffusion.runs.llm.methods import load_base

    given: dict[str, Any] = {"task": "sst2", "model": str(places.model), "method": "quzo"}
    own = [*TASKS["sst2"]["settings"], *METHODS[cell].settings, *settings]
    own += [f"compute.dtype={places.dtype}"] if places.dtype else []
    for text in [*own, f"data.dir={places.data / 'sst2'}"]:
        set_dotted(given, *parse_override(text, LlmConfig))
    plan = llm_run.make_plan(make_config(given, LlmConfig))
    base = load_base(plan.config, plan.model_folder, plan.device, plan.dtype)
    encoded = encode(base.lm, plan.splits.train, 64)
    return Case(plan, base, TextBatches(base.lm, encoded, batch_size=batch, seed=0))


def _seconds(work: Callable[[], Any]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def over_forwards(places: Places, rounds: int = 12) -> dict[str, float]:
    """Processor time of a step over as many plain forward passes of its batch, by cell."""
    return {
        cell: _over_forwards(places, cell, rounds) for cell in ("quzo_default", "quzo_int8_slow")
    }


def _over_forwards(places: Places, cell: str, rounds: int) -> float:
    """The median over rounds without the first two; feedback of few past steps costs less."""
    from qzo_diffusion.llm.objectives import task_loss
    from qzo_diffusion.runs import build
    from qzo_diffusion.train.loop import Setup, train_step_

    method = METHODS[cell]
    case = load(places, cell, f"data.batch_size={method.batch}", batch=method.batch)
    setup = Setup(
        objective=lambda one: task_loss(case.base.lm, one),
        parametrization=case.base.theta,
        optimizer=case.base.optimizer,
        batch_of_step=case.batches,
        probing=build.probing(case.plan.config),
        schedule=lambda step: 1e-9,
    )
    ratios = []
    for step in range(rounds):
        batch = case.batches(step)
        copies = repeated(batch.micro_batches[0], method.probes)

        def plain(copies: Any = copies) -> None:
            with torch.no_grad():
                task_loss(case.base.lm, copies)

        forwards = _seconds(plain)
        taken = _seconds(lambda batch=batch, step=step: train_step_(setup, batch, step))  # type: ignore[misc]
        ratios.append(taken / forwards)
    return round(statistics.median(ratios[2:]), 3)


def slopes(places: Places, draws: int = 4) -> dict[str, Any]:
    """Slopes along three kinds of directions, on one batch of 16 in fp32, of the default's layers.

    `each` is the rms of an example's slope along its own direction, `mean` that of the batch's loss
    along a shared one, both for a change of all weights by their rms. `along_update` is the slope
    along the mean of 16 estimates, mean² · √16 / each: of one shared direction it is `mean`.
    `curvature` is the mean second derivative of the batch's loss, and `gain` what the best step
    along an estimate of one batch lowers its loss by, along_update² / (2 · curvature).
    """
    case = load(places, "quzo_default", "compute.dtype=float32")
    scales, names = case.base.scales, list(case.base.trained)
    grids = {name: module.grid for name, module in _layers(case.base.lm.model, names).items()}
    size = math.sqrt(
        statistics.fmean(float(scales[name].float().square().mean()) for name in names)
    )
    stored = RoundedCodes(scales, grids, 64)
    factors = parametrize(scales, "separable", trained=names, stored=stored)
    assert isinstance(factors, Grouped)
    layers = _layers(case.base.lm.model, names)
    kinds: dict[str, tuple[float, float, Callable[[bool], Shown]]] = {
        "every code": (1.0, size, lambda shared: _every_code(Codes(scales, grids, names, "float"))),
        "rank 1": (1.0, size, lambda shared: _rank_one(layers, shared)),
        "factors": (0.03, math.sqrt(0.5), lambda shared: _factors(factors, shared)),
    }
    found = {}
    for kind, (eps, unit, shown) in kinds.items():
        every = kind == "every code"
        shared, curved = _derivatives(case, shown(True), eps, draws)
        own = shared if every else _derivatives(case, shown(False), eps, draws)[0]
        mean = float(shared.mean(1).square().mean().sqrt()) * unit
        each, curvature = float(own.square().mean().sqrt()) * unit, float(curved.mean()) * unit**2
        along = mean if every else mean**2 * math.sqrt(BATCH) / each
        figures = {"each": each, "mean": mean, "along_update": along, "curvature": curvature}
        figures["gain"] = along**2 / (2 * curvature)
        found[kind] = {name: round(value, 4) for name, value in figures.items()}
        print(kind, found[kind], file=sys.stderr)
    return found


def _layers(model: nn.Module, names: list[str]) -> dict[str, IntGridLinear]:
    found = {name: model.get_submodule(name) for name in names}
    return {name: one for name, one in found.items() if isinstance(one, IntGridLinear)}


def _derivatives(case: Case, shown: Shown, eps: float, draws: int) -> tuple[Tensor, Tensor]:
    """First and second derivatives [draws, examples] along as many directions."""
    plain = case.losses()
    slopes, curvatures = [], []
    for draw in range(draws):
        with shown(draw, eps):
            above = case.losses()
        with shown(draw, -eps):
            below = case.losses()
        slopes.append((above - below) / (2 * eps))
        curvatures.append((above + below - 2 * plain) / eps**2)
    return torch.stack(slopes), torch.stack(curvatures)


def _every_code(theta: Codes) -> Shown:
    return lambda draw, radius: theta.scales.override(theta.perturbed(Direction(5, draw), radius))


def _factors(theta: Grouped, shared: bool) -> Shown:
    def shown(draw: int, radius: float) -> Any:
        directions = directions_of_step(5, draw, 1 if shared else BATCH, "rademacher")
        return theta.scales.override(*theta.probes(directions, [radius]))

    return shown


def _rank_one(layers: dict[str, IntGridLinear], shared: bool) -> Shown:
    """Codes changed by radius · r sᵀ with signs r and s, for each example or for all."""

    @contextmanager
    def shown(draw: int, radius: float) -> Iterator[None]:
        hooks = []
        for name, layer in layers.items():
            generator = torch_generator(5, draw, name)
            groups = 1 if shared else BATCH
            r, s = (
                torch.randint(0, 2, (groups, size), generator=generator).float() * 2 - 1
                for size in (layer.out_features, layer.in_features)
            )
            added = radius * r * (layer.scales / layer.grid.largest)
            hooks.append(layer.register_forward_hook(_adds(s, added)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    return shown


def _adds(s: Tensor, added: Tensor) -> Callable[..., Tensor]:
    def hook(_layer: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        x = args[0].view(len(s), -1, args[0].shape[-1])
        more = torch.bmm(x, s.unsqueeze(2)) * added.unsqueeze(1)
        return output + more.view_as(output)

    return hook


def spread(places: Places, directions: int = 4) -> dict[str, Any]:
    """Rounded probes beside those in floating point, by eps: variance of p / eps, and of the slope
    along independent directions.
    """
    from qzo_diffusion.llm.objectives import task_loss
    from qzo_diffusion.quant.load import find_codes

    case = load(places, "quzo_int8")
    base, step_batch = case.base, case.batches(0)
    scales, grids = find_codes(base.lm.model)
    rows: dict[str, Any] = {}
    for kind in ("codes", "float"):
        theta = Codes(scales, grids, probe=kind)  # type: ignore[arg-type]
        for eps in EPS:
            name = next(iter(scales))
            view = theta.perturbed(Direction(0, 0), eps)
            assert view is not None
            shown = view([name])[name]
            shift = (shown if shown.is_floating_point() else grids[name].codes(shown)) - grids[
                name
            ].codes(scales[name])
            slopes = [
                probe(
                    lambda one: task_loss(base.lm, one), step_batch, theta, Probing(1, eps), index
                ).directional_derivative[0]
                for index in range(directions)
            ]
            rows[f"{kind}, eps {eps}"] = {
                "variance_of_probe": round(float((shift / eps).square().mean()), 3),
                "slope_rms": round(statistics.fmean(slope**2 for slope in slopes) ** 0.5, 4),
            }
            print(kind, eps, rows[f"{kind}, eps {eps}"], file=sys.stderr)
    return rows
