"""Keep θ near the base, where θ is zero: shrink it before each step, bound it after.

    θ <- (1 - κ · lr) θ                   decoupled weight decay (AdamW, arXiv 1711.05101)
    θ <- update of any optimizer
    θ <- min(max(θ, -B), B)               a box: no number goes further than B

Gradients of scales are sparse: on `tiny` 100 of 28,456 numbers hold 93 % of the squared gradient
(docs/decisions/keeping_content.md D76). Plain steps move those few far, and pictures lose their
shapes. The exact gradient's plain steps do the same. The box hands the rest of the way to the other
numbers, as Adam's equal steps would, without a division by noise.
"""

from collections.abc import Mapping

from torch import Tensor

from qzo_diffusion.core.optimizer import Adam, Optimizer, Update
from qzo_diffusion.core.parametrization import Parametrization


class NearBase:
    """Any optimizer, with decay before and a bound after its step.

    It has no state of its own.

    Args:
        decay: κ ≥ 0, relative to the rate.
        bound: B > 0 in the units of θ; None is no bound.

    Raises:
        ValueError: κ · lr of a step is above 1, so that θ would change its sign.
    """

    def __init__(self, inner: Optimizer, decay: float = 0.0, bound: float | None = None) -> None:
        self._inner, self._decay, self._bound = inner, decay, bound

    def with_room(self, factor: float) -> "NearBase":
        """The same with `factor` times the bound."""
        bound = None if self._bound is None else self._bound * factor
        return NearBase(self._inner, self._decay, bound)

    def step_(self, parametrization: Parametrization, update: Update) -> None:
        self._shrink_(parametrization, update.lr)
        self._inner.step_(parametrization, update)
        self._clip_(parametrization)

    def descend_(
        self, parametrization: Parametrization, gradient: Mapping[str, Tensor], lr: float
    ) -> None:
        """A step of Adam along a gradient that is known, by name."""
        assert isinstance(self._inner, Adam)
        self._shrink_(parametrization, lr)
        self._inner.descend_(parametrization, gradient, lr)
        self._clip_(parametrization)

    def _shrink_(self, parametrization: Parametrization, lr: float) -> None:
        factor = 1 - self._decay * lr
        if factor < 0:
            raise ValueError(f"decay {self._decay} times rate {lr}: at most 1")
        if factor != 1:
            for theta in parametrization.state().values():
                theta.mul_(factor)

    def _clip_(self, parametrization: Parametrization) -> None:
        if self._bound is not None:
            for theta in parametrization.state().values():
                theta.clamp_(-self._bound, self._bound)

    def state(self) -> dict[str, Tensor]:
        return self._inner.state()

    def load_state_(self, state: dict[str, Tensor]) -> None:
        self._inner.load_state_(state)
