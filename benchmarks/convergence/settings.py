"""Settings of the methods that are compared: phases, methods, families of rates, and cells."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from qzo_diffusion.core.noise import Distribution
from qzo_diffusion.core.optimizer import OptimizerName, ScheduleName
from qzo_diffusion.core.parametrize import Level, Units
from qzo_diffusion.core.probing import Estimator
from qzo_diffusion.diffusion.flow_matching import SigmaDistribution
from qzo_diffusion.train.calibrate import calibration_batches

# every one is a Task (benchmarks.convergence.tasks)
DATA = ("fluent_mono", "openmoji", "fluent3d", "sst2")
TEXT = "sst2"  # a language model, whose rates are others
# another style, block size, code book and back-end than the default was found on
UNSEEN = "twemoji_fp4_128"
# forward passes, each of one example
BUDGET, LONG_BUDGET, LONGEST_BUDGET = 16_000, 64_000, 256_000
FIRST_ORDER_STEPS = 200
TRIED_ON = ("fluent_mono", "openmoji")  # where alternatives are run
DEFAULT = "default"
# rates beyond the stated grid; then the report says that the best is at the edge
MOST_EXTENSIONS = 6


@dataclass(frozen=True)
class Phase:
    """A part of a run: which numbers are trained, how they are probed, and what is done with the
    estimate.

    level: lora is adapters, which first order alone trains (`adapters`).
    num_directions: of each example, or of all together; the same in all phases of a method, as a
    step's cost is. rate: the learning rate as a multiple of the family's; the schedule runs over
    this phase alone. share: of the run's steps. eps in the units of the numbers. calibrate: the
    rate is lowered to suit slope and curvature where the run begins, for `Method.calibration`
    forward passes. bound: how far a number may go from the base, before it is calibrated."""

    level: Level | Literal["lora"]
    layers: Literal["quiet"] | None = None
    rate: float = 1.0
    share: float = 1.0
    units: Units = "relative"
    eps: float = 1e-2
    directions: Distribution = "rademacher"
    per_example: bool = False
    num_directions: int = 1
    estimator: Estimator = "antithetic"
    regions: int = 1
    normalize: bool | Literal["running"] = False
    sigma: SigmaDistribution = "uniform"
    clip_threshold: float | None = None
    optimizer: OptimizerName = "sgd"
    schedule: ScheduleName = "constant"
    calibrate: bool = False
    bound: float | None = None


@dataclass(frozen=True)
class Method:
    """All settings of a run but its data and its seed.

    budget: forward passes of one example; with `first_order`, forward and backward passes, counted
    apart. Noise levels of training are uniform and stratified where nothing else is said, as those
    of the held-out loss are."""

    name: str
    lr: float
    phases: tuple[Phase, ...]
    first_order: bool = False
    batch: int = 16
    budget: int = BUDGET

    @property
    def cost_of_step(self) -> int:
        """Forward passes: one for each direction of each example, two if both sides are probed."""
        if self.first_order:
            return self.batch
        probes = self.phases[0].num_directions * (
            2 if self.phases[0].estimator == "antithetic" else 1
        )
        return probes * self.batch

    @property
    def calibration(self) -> int:
        """Forward passes before the first step."""
        return 3 * calibration_batches(self.batch) * self.batch if self.phases[0].calibrate else 0

    @property
    def steps(self) -> int:
        return max(1, (self.budget - self.calibration) // self.cost_of_step)

    def ends(self) -> list[int]:
        """The step after the last of each phase."""
        done, ends = 0.0, []
        for phase in self.phases:
            done += phase.share
            ends.append(round(self.steps * done))
        return ends

    def settings(self) -> dict[str, Any]:
        return asdict(self) | {"phases": [asdict(phase) for phase in self.phases]}


@dataclass(frozen=True)
class Family:
    """A method at several learning rates.

    exponents: of √10, the grid; a single one, which need not be whole, is a rate that was settled
    before and is not extended. on_text: what is other in the phases on a language model, and
    over_text what the rate is divided by there. seeds: how many at the best rate. data: where it
    runs. same_rate_as: another family, whose best rate is taken instead of a grid.
    """

    template: Method
    exponents: tuple[float, ...]
    what: str
    seeds: int = 1
    same_rate_as: str | None = None
    data: tuple[str, ...] = DATA
    on_text: tuple[tuple[str, Any], ...] = ()
    over_text: float = 1

    @property
    def name(self) -> str:
        return self.template.name

    def at(self, exponent: float, data: str = "") -> Method:
        lr = rate(exponent) / (self.over_text if data == TEXT else 1)
        return replace(
            self.template, name=f"{self.name}_lr{lr:.3g}", lr=lr, phases=self.phases(data)
        )

    def phases(self, data: str) -> tuple[Phase, ...]:
        other = dict(self.on_text) if data == TEXT else {}
        return tuple(replace(phase, **other) for phase in self.template.phases)


@dataclass(frozen=True)
class Cell:
    """One run: `data/method_seed` names it and its file."""

    data: str
    method: Method
    seed: int

    @property
    def name(self) -> str:
        return f"{self.data}/{self.method.name}_{self.seed}"


def rate(exponent: float) -> float:
    """√10 to the power of `exponent`, to six digits, so that files and tables can name it."""
    return float(f"{math.sqrt(10) ** exponent:.6g}")
