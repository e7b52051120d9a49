"""The factors of a run's rate and bound: measured before its first step, read from its journal when
it goes on.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qzo_diffusion.core.errors import ConfigError
from qzo_diffusion.core.journal import Journal
from qzo_diffusion.core.near_base import NearBase
from qzo_diffusion.runs.plan import Components, Plan
from qzo_diffusion.system.console import report
from qzo_diffusion.system.progress import Progress
from qzo_diffusion.train.calibrate import LrCalibration, calibrate
from qzo_diffusion.train.distributed import Ranks

RATE, ROOM = "lr_factor", "bound_factor"  # keys in the journal's header, if they were measured


@dataclass(frozen=True)
class Factors:
    """Factors of `train.lr` and `prior.bound`; 1 without calibration."""

    rate: float = 1.0
    room: float = 1.0
    measured: bool = False

    def header(self, bounded: bool) -> dict[str, Any]:
        """Their entries in the journal's header."""
        if not self.measured:
            return {}
        return {RATE: self.rate} | ({ROOM: self.room} if bounded else {})


UNCALIBRATED = Factors()


def calibrated_(
    plan: Plan, components: Components, ranks: Ranks, journal: Journal | None
) -> Factors:
    """Find the factors and give the optimizer its bound.

    A run that goes on keeps the bound of its first step, also where its rate is chosen anew:
    its journal has one bound.

    Raises:
        ConfigError: a run that goes on was not calibrated where it began.
    """
    train = plan.config.train
    wanted = train.calibrate_lr and train.max_steps > 0
    if journal is not None:
        found = _read(journal, wanted)
    else:
        found = _measured(plan, components, ranks) if wanted else UNCALIBRATED
    if isinstance(components.optimizer, NearBase):
        components.optimizer = components.optimizer.with_room(found.room)
    return found


def _read(journal: Journal, rate_wanted: bool) -> Factors:
    header = journal.header
    room = float(header.get(ROOM, 1.0))
    if not rate_wanted:
        return Factors(room=room)
    if RATE not in header:
        raise ConfigError(
            "train.calibrate_lr=true for a run whose rate was not calibrated where it began",
            "a rate that the run had from its first step on",
            "add train.calibrate_lr=false --force, or start a new run",
        )
    return Factors(float(header[RATE]), room, measured=True)


def _measured(plan: Plan, components: Components, ranks: Ranks) -> Factors:
    def with_bar(steps: Iterable[int]) -> Iterable[int]:
        return Progress(
            steps, desc="calibrate train.lr", unit="batch", leave=False, disable=not ranks.first
        )

    found = calibrate(
        components.objective,
        components.batches,
        components.theta,
        plan.probing(),
        ranks.sum,
        with_bar,
    )
    if ranks.first:
        _report(plan, found)
    return Factors(found.rate_factor, found.room, measured=True)


def _report(plan: Plan, found: LrCalibration) -> None:
    train, bound = plan.config.train, plan.config.prior.bound
    changes = []
    if found.rate_factor < 1:
        changes.append(f"train.lr {train.lr:.3g} -> {train.lr * found.rate_factor:.3g}")
    if bound is not None and found.room != 1:
        changes.append(f"prior.bound {bound:.3g} -> {bound * found.room:.3g}")
    if changes:
        report(
            f"{', '.join(changes)}: the loss has a slope of {found.slope:.2g} for a curvature of "
            f"{found.curvature:.2g} (train.calibrate_lr=false leaves them alone)"
        )
