"""One cell: a run that can be stopped anywhere and goes on as if it had not been, and its result as
a JSON file.

The trained numbers, the optimizer's state and the curve so far are in one file outside of the
results, replaced as a whole. Data, directions and noise follow from (seed, step), so nothing random
has to be saved."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from benchmarks.convergence.adapters import Adapters
from benchmarks.convergence.results import to_json
from benchmarks.convergence.settings import Cell
from benchmarks.convergence.tasks import Task
from benchmarks.record import provenance
from qzo_diffusion.core.dense import Dense
from qzo_diffusion.core.errors import TrainingDiverged
from qzo_diffusion.core.grouped import Grouped
from qzo_diffusion.core.near_base import NearBase
from qzo_diffusion.core.optimizer import Adam, Optimizer, Schedule, make_optimizer, make_schedule
from qzo_diffusion.core.oracle import exact_gradient
from qzo_diffusion.core.parametrization import Parametrization
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.core.probing import Probing
from qzo_diffusion.core.spsa import mean_loss
from qzo_diffusion.quant.choose import chosen
from qzo_diffusion.system.files import write_whole
from qzo_diffusion.train.calibrate import calibrate
from qzo_diffusion.train.loop import Setup, StepRecord, train

EVALUATIONS = 50  # every 2 % of the budget
CPU_LIMIT_SECONDS = 40 * 60
CHECKPOINT_SECONDS = 60
# times the loss at the start: no rate that is this far off comes back, and the time is better spent
DIVERGED = 4.0

Curve = list[tuple[int, float | None]]
"""(forward passes spent on training, held-out loss; None where it was not finite)."""


@dataclass
class Progress:
    """How far a cell is; seconds are those of training, of evaluation, and of the processor for
    both.

    rate_factor, room: of a calibrated rate and of its bound, once they are measured.
    """

    step: int = 0
    phase: int = 0
    curve: Curve = field(default_factory=list)
    skipped: int = 0
    bad_in_a_row: int = 0
    rate_factor: float | None = None
    room: float = 1.0
    train_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    cpu_seconds: float = 0.0


class CellRun:
    """A cell between two steps. `close` puts the model back to what it was."""

    def __init__(self, cell: Cell, task: Task, checkpoint: Path) -> None:
        self.cell, self.method, self._task, self._checkpoint = cell, cell.method, task, checkpoint
        self._initial = {name: live.clone() for name, live in task.scales.tensors().items()}
        self.progress = Progress()
        self._adapters: Adapters | None = None
        self._enter(0)
        self._load_()

    def close(self) -> None:
        if self._adapters is not None:
            self._adapters.remove_()
        for name, live in self._task.scales.tensors().items():
            live.copy_(self._initial[name])

    def _enter(self, phase: int) -> None:
        settings = self.method.phases[phase]
        self.progress.phase = phase
        self._batches = self._task.batches(
            self.cell.seed, self.method.batch, settings.regions, settings.sigma
        )
        token_wise = self._task.token_wise if settings.regions > 1 else ()
        trained = chosen(self._task.scales, settings.layers)
        if settings.level == "lora":
            if self._adapters is None:
                self._adapters = Adapters(self._task.model, list(self._task.scales), self.cell.seed)
            self.theta: Parametrization = self._adapters.theta
        else:
            self.theta = parametrize(
                self._task.scales, settings.level, settings.units, trained, token_wise
            )
        made = make_optimizer(settings.optimizer, in_running_rms=settings.normalize == "running")
        self.optimizer: Any = Adam() if self.method.first_order else made

    def advance(self, target: int, stop_requested: Callable[[], bool]) -> None:
        """Go on to step `target`, through as many phases as that takes, or until asked to stop.

        Raises:
            TrainingDiverged: the losses are no numbers any more.
        """
        ends = self.method.ends()
        began, cpu = time.perf_counter(), time.process_time()
        try:
            while self.progress.step < target and not stop_requested():
                if self.progress.step >= ends[self.progress.phase]:
                    self.theta.merge_()
                    self._enter(self.progress.phase + 1)
                stop = min(target, ends[self.progress.phase])
                (self._exact_steps if self.method.first_order else self._probed_steps)(
                    stop, stop_requested
                )
        finally:
            self.progress.train_seconds += time.perf_counter() - began
            self.progress.cpu_seconds += time.process_time() - cpu

    def _probed_steps(self, stop: int, stop_requested: Callable[[], bool]) -> None:
        settings, progress = self.method.phases[self.progress.phase], self.progress

        def note(record: StepRecord) -> None:
            progress.step = record.step + 1
            progress.skipped += record.skipped
            progress.bad_in_a_row = progress.bad_in_a_row + 1 if record.skipped else 0

        probing = Probing(
            seed=self.cell.seed,
            eps=settings.eps,
            per_example=settings.per_example,
            num_directions=settings.num_directions,
            estimator=settings.estimator,
            distribution=settings.directions,
            clip_threshold=settings.clip_threshold,
            normalize=settings.normalize is True,
        )
        if settings.calibrate and progress.rate_factor is None:
            calibration = calibrate(self._task.objective, self._batches, self.theta, probing)
            progress.rate_factor, progress.room = calibration.rate_factor, calibration.room
        optimizer: Optimizer = self.optimizer
        if settings.bound is not None:
            optimizer = NearBase(optimizer, bound=settings.bound * progress.room)
        schedule = self._schedule()
        train(
            Setup(self._task.objective, self._batches, self.theta, optimizer, probing, schedule),
            max_steps=stop,
            first_step=progress.step,
            bad_steps_before=progress.bad_in_a_row,
            on_step=note,
            stop_requested=stop_requested,
        )

    def _schedule(self) -> Schedule:
        """Of the phase, which begins where the one before ends."""
        phase, ends = self.progress.phase, self.method.ends()
        start = ends[phase - 1] if phase else 0
        settings = self.method.phases[phase]
        lr = self.method.lr * settings.rate * (self.progress.rate_factor or 1.0)
        of_phase = make_schedule(settings.schedule, lr, ends[phase] - start)
        return lambda step: of_phase(step - start)

    def _exact_steps(self, stop: int, stop_requested: Callable[[], bool]) -> None:
        schedule = self._schedule()
        while self.progress.step < stop and not stop_requested():
            batch = self._batches(self.progress.step)
            gradient = self._gradient(batch.micro_batches)
            if not all(bool(slope.isfinite().all()) for slope in gradient.values()):
                raise TrainingDiverged(
                    "a gradient that is NaN or infinite", "finite numbers", "lower the rate"
                )
            self.optimizer.descend_(self.theta, gradient, schedule(self.progress.step))
            self.progress.step += 1

    def _gradient(self, micro_batches: Sequence[Any]) -> dict[str, Tensor]:
        if self._adapters is not None:
            return self._adapters.gradient(self._task.objective, micro_batches, self.theta)
        assert isinstance(self.theta, Dense | Grouped)
        return exact_gradient(self._task.objective, micro_batches, self.theta, self._task.handles())

    @property
    def spent(self) -> int:
        """Forward passes so far; those of evaluations don't count."""
        calibration = 0 if self.progress.rate_factor is None else self.method.calibration
        return self.progress.step * self.method.cost_of_step + calibration

    def evaluate(self) -> float:
        """Append the held-out loss to the curve."""
        began, cpu = time.perf_counter(), time.process_time()
        with self.theta.scales.override(self.theta.perturbed()):
            loss = mean_loss(self._task.objective, self._task.held_out)
        self.progress.curve.append((self.spent, loss if math.isfinite(loss) else None))
        self.progress.evaluate_seconds += time.perf_counter() - began
        self.progress.cpu_seconds += time.process_time() - cpu
        return loss

    def save(self) -> None:
        """Everything that a resumed run needs; the live scales too, since dense numbers and merged
        phases are in them.
        """
        tensors = {f"scales.{name}": live for name, live in self._task.scales.tensors().items()}
        tensors |= {f"numbers.{name}": tensor for name, tensor in self.theta.state().items()}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in self.optimizer.state().items()}
        plain = {
            name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()
        }
        notes = {
            "settings": json.dumps(self.method.settings()),
            "progress": json.dumps(asdict(self.progress)),
        }
        self._checkpoint.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._checkpoint, save(plain, metadata=notes))

    def _load_(self) -> None:
        """Go on from the checkpoint; one of other settings, or a damaged one, is of no use and the
        cell begins anew.
        """
        if not self._checkpoint.exists():
            return
        try:
            with safe_open(str(self._checkpoint), framework="pt") as file:
                notes = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):
            return
        if json.loads(notes["settings"]) != self.method.settings():
            return
        progress = Progress(**json.loads(notes["progress"]))
        progress.curve = [(spent, loss) for spent, loss in progress.curve]
        for name, live in self._task.scales.tensors().items():
            live.copy_(tensors[f"scales.{name}"])
        self.progress = progress
        self._enter(progress.phase)
        for part, prefix in ((self.theta, "numbers."), (self.optimizer, "optimizer.")):
            part.load_state_(
                {
                    name.removeprefix(prefix): t
                    for name, t in tensors.items()
                    if name.startswith(prefix)
                }
            )

    def drop(self) -> None:
        self._checkpoint.unlink(missing_ok=True)


@dataclass(frozen=True)
class Folders:
    """results: finished cells, in the repository; cache: checkpoints and encoded data, outside of
    it.
    """

    results: Path
    cache: Path

    def result(self, cell: Cell) -> Path:
        return self.results / f"{cell.name}.json"

    def checkpoint(self, cell: Cell) -> Path:
        return self.cache / "cells" / f"{cell.name}.safetensors"


def run_cell(
    cell: Cell,
    task: Task,
    folders: Folders,
    *,
    stop_requested: Callable[[], bool] = lambda: False,
    command: str | None = None,
    show: bool = False,
) -> dict[str, Any] | None:
    """The result of the cell, which is also written; None when it was stopped, and then its
    checkpoint is.

    Args:
        command: recorded instead of this process's own, which may name folders of one machine.
        show: a progress bar with the rate and the time at which the cell will end.
    """
    run = CellRun(cell, task, folders.checkpoint(cell))
    try:
        ended = finish(run, stop_requested, show)
        if ended is None:
            return None
        result = _result(run, ended) | {
            "provenance": provenance() | ({"command": command} if command else {})
        }
        folders.result(cell).parent.mkdir(parents=True, exist_ok=True)
        write_whole(folders.result(cell), (to_json(result) + "\n").encode())
        run.drop()
        return result
    finally:
        run.close()


def finish(run: CellRun, stop_requested: Callable[[], bool], show: bool) -> str | None:
    """Train to the end, with evaluations and checkpoints. Says why it ended; None when it was asked
    to.
    """
    progress, total = run.progress, run.method.steps
    every = max(1, total // EVALUATIONS)
    saved = time.monotonic()
    shape = (
        "{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} {rate_fmt}, ends "
        "{eta:%H:%M:%S}{postfix}"
    )
    with tqdm(
        total=total,
        initial=progress.step,
        desc=run.cell.name,
        unit="step",
        bar_format=shape,
        disable=not show,
    ) as bar:
        while True:
            due = progress.step % every == 0 or progress.step == total
            if due and (not progress.curve or progress.curve[-1][0] < run.spent):
                loss = run.evaluate()
                bar.set_postfix(loss=f"{loss:.4f}")
                if not loss <= DIVERGED * (progress.curve[0][1] or math.inf):  # NaN too
                    return "diverged"
            if progress.step == total:
                return "budget"
            if progress.cpu_seconds > CPU_LIMIT_SECONDS:
                return "time limit"
            if stop_requested():
                run.save()
                return None
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                run.save()
                saved = time.monotonic()
            try:
                run.advance(min(total, (progress.step // every + 1) * every), stop_requested)
            except TrainingDiverged:
                return "diverged"
            bar.update(progress.step - bar.n)


def _result(run: CellRun, ended: str) -> dict[str, Any]:
    progress = run.progress
    return {
        "cell": run.cell.name,
        "data": run.cell.data,
        "seed": run.cell.seed,
        "settings": run.method.settings(),
        "unit": "examples forwards and backwards" if run.method.first_order else "example-forwards",
        "ended": ended,
        "start_loss": progress.curve[0][1],
        "final_loss": progress.curve[-1][1] if ended != "diverged" else None,
        "steps": progress.step,
        "skipped_steps": progress.skipped,
        "rate_factor": progress.rate_factor,
        "seconds": {
            "train": round(progress.train_seconds, 1),
            "evaluate": round(progress.evaluate_seconds, 1),
            "processor": round(progress.cpu_seconds, 1),
        },
        "curve": progress.curve,
    }
