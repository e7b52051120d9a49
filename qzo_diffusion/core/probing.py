"""Settings and batch of a step's probes, which `core.spsa` and the loop share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Literal

from qzo_diffusion.core.noise import Distribution
from qzo_diffusion.core.probes import Batch

Estimator = Literal["antithetic", "leave_one_out"]


@dataclass(frozen=True)
class StepBatch(Generic[Batch]):
    """The micro-batches of one step that this process evaluates.

    Args:
        micro_batches: parts that fit into memory.
        sigma_mean: the mean noise level, for objectives that have one.
        first_example: where the micro-batches begin in the whole batch over all processes.
        examples: of the whole batch; None where the micro-batches are all of it.
        patch_groups: how many losses the objective gives for an example. With more than one, each
            patch group is probed along a direction of its own.
        leading: how many examples of the whole batch are normalised by their own spread
            (`Probing.within_example`); None is all.
    """

    micro_batches: Sequence[Batch]
    sigma_mean: float | None = None
    first_example: int = 0
    examples: int | None = None
    patch_groups: int = 1
    leading: int | None = None

    @property
    def whole(self) -> int:
        """Number of examples of the whole batch."""
        return sum(map(len, self.micro_batches)) if self.examples is None else self.examples  # type: ignore[arg-type]


@dataclass(frozen=True)
class Probing:
    """Settings of the gradient estimator: radius, directions, estimator, clipping.

    Args:
        seed: of the run; with the step it gives the directions.
        eps: ε, the radius of a probe, in the parametrization's units.
        num_directions: directions of a step, or of each example with `per_example`.
        per_example: whether each example has directions of its own.
        clip_threshold: C of derivative clipping; None clips nothing.
        normalize: whether the derivatives of a step are divided by their rms. A step of one
            direction then keeps only its sign.
        probes_per_forward: the most probes of a micro-batch in one forward pass, where
            parametrization and batch allow several; None is all of them.
        within_example: for losses without a common unit, such as scores of pictures. Derivatives
            are first divided by their rms over the directions of their own example, and a direction
            with a loss that is not finite is left out, not the step. Needs `per_example`.
    """

    seed: int
    eps: float
    num_directions: int = 1
    per_example: bool = False
    distribution: Distribution = "rademacher"
    clip_threshold: float | None = None
    normalize: bool = False
    probes_per_forward: int | None = None
    estimator: Estimator = "antithetic"
    within_example: bool = False

    @property
    def radii(self) -> tuple[float, ...]:
        """The radii at which each direction is probed: at both sides, or at one."""
        return (self.eps, -self.eps) if self.estimator == "antithetic" else (self.eps,)
