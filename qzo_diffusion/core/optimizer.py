"""Update θ with the estimate: SGD, momentum or Adam, and the schedule of the learning rate.

The gradient estimate of a step is ĝ = mean over directions of (projected_grad · z). SGD moves along
each direction in turn and stores nothing. Momentum stores one tensor like θ, Adam two (one and a
scalar with a single Rademacher direction a step, where ĝ² is the same everywhere), in 32 bits a
number or fewer (`core.remembered`). Arithmetic is kept to separate multiply, add, divide and sqrt:
fused forms (`addcmul`, `lerp`) round differently between processors, and a run must replay."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from qzo_diffusion.core.low_bit_maps import steady_beta
from qzo_diffusion.core.noise import Direction
from qzo_diffusion.core.parametrization import Parametrization
from qzo_diffusion.core.remembered import Bits, first_moment, second_moment
from qzo_diffusion.core.spsa import rms

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Update:
    """Everything that a step's change of θ follows from, and all that a journal keeps of it.

    `projected_grad` has a scalar for each patch group of each direction.
    """

    directions: tuple[Direction, ...]
    projected_grad: tuple[float, ...]
    lr: float


class Optimizer(Protocol):
    def step_(self, parametrization: Parametrization, update: Update) -> None: ...

    def state(self) -> dict[str, Tensor]: ...

    def load_state_(self, state: dict[str, Tensor]) -> None: ...


def gradient_of(parametrization: Parametrization, update: Update, name: str) -> Tensor:
    """ĝ for the θ of one name: the mean of projected_grad · z over directions and patch groups."""
    count = len(update.projected_grad)
    return parametrization.combined(
        name, update.directions, [g / count for g in update.projected_grad]
    )


class Sgd:
    """θ <- θ - lr · ĝ. No state."""

    def step_(self, parametrization: Parametrization, update: Update) -> None:
        amounts = [-update.lr * g / len(update.projected_grad) for g in update.projected_grad]
        parametrization.move_(update.directions, amounts)

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state_(self, state: dict[str, Tensor]) -> None:
        if state:
            raise ValueError("SGD has no state to load")


class Momentum:
    """m <- β m + ĝ; θ <- θ - lr · (1 - β) · m. The factor keeps lr comparable with SGD's.

    In fewer than 8 bits β is `steady_beta`.
    """

    def __init__(self, beta: float = 0.9, state_bits: Bits = 32) -> None:
        self.beta = steady_beta(beta, state_bits)
        self._velocity = first_moment("velocity", state_bits)

    def step_(self, parametrization: Parametrization, update: Update) -> None:
        for name, like in parametrization.templates().items():
            known = self._velocity.read(name, like)
            velocity = torch.zeros_like(like) if known is None else known
            velocity.mul_(self.beta).add_(gradient_of(parametrization, update, name))
            self._velocity.write(name, velocity)
            parametrization.add_(name, velocity * (-update.lr * (1 - self.beta)))

    def state(self) -> dict[str, Tensor]:
        return self._velocity.state()

    def load_state_(self, state: dict[str, Tensor]) -> None:
        self._velocity.load_(state)


class Adam:
    """Adam (Kingma & Ba 2015) without weight decay, on ĝ or on a gradient that is known.

    Second moments of fewer than 8 bits are rounded at random, as the seed of the directions says,
    or `seed` where a gradient is known; the first have `steady_beta`.
    """

    beta2, tiny = 0.99, 1e-8

    def __init__(self, beta1: float = 0.9, state_bits: Bits = 32, seed: int = 0) -> None:
        self.beta1 = steady_beta(beta1, state_bits)
        self._count, self._seed = 0, seed
        self._first = first_moment("first", state_bits)
        self._second = second_moment("second", state_bits)

    def step_(self, parametrization: Parametrization, update: Update) -> None:
        bias1, bias2 = self._count_step()
        for name in parametrization.templates():
            grad = gradient_of(parametrization, update, name)
            square = self._square(parametrization, update, grad)
            change = self._change(name, grad, square, bias2, update.directions[0].seed)
            parametrization.add_(name, change * (-update.lr / bias1))

    def descend_(
        self, parametrization: Parametrization, gradient: Mapping[str, Tensor], lr: float
    ) -> None:
        """A step along a gradient that is known, by name."""
        bias1, bias2 = self._count_step()
        for name, grad in gradient.items():
            change = self._change(name, grad, grad * grad, bias2, self._seed)
            parametrization.add_(name, change * (-lr / bias1))

    def _count_step(self) -> tuple[float, float]:
        """The factors by which the two moments are too small after so many steps."""
        self._count += 1
        return 1 - self.beta1**self._count, 1 - self.beta2**self._count

    def _change(self, name: str, grad: Tensor, square: Tensor, bias2: float, seed: int) -> Tensor:
        """Take `grad` into the moments; the first divided by the root of the second."""
        first, second = self._first.read(name, grad), self._second.read(name, grad)
        if first is None or second is None:
            first, second = torch.zeros_like(grad), torch.zeros_like(square)
        if square.numel() > second.numel():  # more directions a step than before
            second = second.expand_as(square).clone()
        first.mul_(self.beta1).add_(grad * (1 - self.beta1))
        second.mul_(self.beta2).add_(square * (1 - self.beta2))
        self._first.write(name, first)
        self._second.write(name, second, seed, self._count)
        return first / (torch.sqrt(second / bias2) + self.tiny)

    @staticmethod
    def _square(theta: Parametrization, update: Update, grad: Tensor) -> Tensor:
        signs = update.directions[0].distribution == "rademacher"
        if len(update.projected_grad) == 1 and signs and not getattr(theta, "in_subspace", False):
            return grad.new_tensor(update.projected_grad[0] ** 2)
        return grad * grad

    def state(self) -> dict[str, Tensor]:
        moments = self._first.state() | self._second.state()
        return moments | {"count": torch.tensor(self._count)}

    def load_state_(self, state: dict[str, Tensor]) -> None:
        self._count = int(state["count"])
        self._first.load_(state)
        self._second.load_(state)


class RunningRms:
    """√(running mean of squares), corrected for a short past as Adam's second moment is.

    1 while all values were 0.
    """

    def __init__(self, decay: float) -> None:
        self._decay, self._count, self._square = decay, 0, 0.0

    def after(self, square: float) -> float:
        """The rms, this square included."""
        self._count += 1
        self._square = self._decay * self._square + (1 - self._decay) * square
        return math.sqrt(self._square / (1 - self._decay**self._count)) or 1.0

    def state(self) -> Tensor:
        """float64 [2]."""
        return torch.tensor([self._count, self._square], dtype=torch.float64)

    def load_state_(self, state: Tensor | None) -> None:
        """Restore a state; None stands for no past."""
        count, self._square = (0, 0.0) if state is None else state.tolist()
        self._count = int(count)


class InRunningRms:
    """Divide derivatives by their running rms, then update with any optimizer.

    One learning rate then suits losses of any scale. Division by each step's own rms would give a
    step of small derivatives the weight of one of large ones, which biases the estimate; here its
    own are soon a tenth of the unit's square, and bias it less."""

    def __init__(self, inner: Optimizer, decay: float = 0.9) -> None:
        self._inner, self._rms = inner, RunningRms(decay)

    def step_(self, parametrization: Parametrization, update: Update) -> None:
        unit = self._rms.after(rms(update.projected_grad, update.directions[0].patch_groups) ** 2)
        self._inner.step_(
            parametrization,
            replace(update, projected_grad=tuple(g / unit for g in update.projected_grad)),
        )

    def state(self) -> dict[str, Tensor]:
        return self._inner.state() | {"spread": self._rms.state()}

    def load_state_(self, state: dict[str, Tensor]) -> None:
        self._inner.load_state_(
            {name: tensor for name, tensor in state.items() if name != "spread"}
        )
        self._rms.load_state_(state.get("spread"))


OptimizerName = Literal["sgd", "momentum", "adam"]
ScheduleName = Literal["constant", "linear", "cosine", "hold", "inverse_sqrt"]
INVERSE_SQRT_STEPS = 32  # after them the rate is 1 / √2 of the first


def make_optimizer(
    name: OptimizerName, in_running_rms: bool = False, state_bits: Bits = 32
) -> Optimizer:
    """The optimizer by its name in a config; SGD has no state to keep in so many bits."""
    kinds: dict[OptimizerName, Callable[[], Optimizer]] = {
        "sgd": Sgd,
        "momentum": lambda: Momentum(state_bits=state_bits),
        "adam": lambda: Adam(state_bits=state_bits),
    }
    return InRunningRms(kinds[name]()) if in_running_rms else kinds[name]()


def make_schedule(
    name: ScheduleName, lr: float, total_steps: int, warmup_steps: int = 0
) -> Schedule:
    """The learning rate by step, counted from 0: warm-up to `lr`, then constant or falling to zero.

    Noise grows with the sum of squared rates and progress with their sum. So an even rate gets
    furthest, the start can take more, and the end should leave no noise. "hold" falls to 5/8 of lr
    in the first eighth; "inverse_sqrt" falls as 1 / √(1 + step / 32), whatever `total_steps` is.
    Both fall to zero in the last 3/10."""

    def at(step: int) -> float:
        if step < warmup_steps:
            return lr * (step + 1) / warmup_steps
        if name == "constant":
            return lr
        done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        if name in ("linear", "cosine"):
            return lr * (1 - done if name == "linear" else 0.5 * (1 + math.cos(math.pi * done)))
        held, falling = (
            1 - 0.375 * min(1.0, 8 * done),
            1 / math.sqrt(1 + (step - warmup_steps) / INVERSE_SQRT_STEPS),
        )
        return lr * (held if name == "hold" else falling) * min(1.0, (1 - done) / 0.3)

    return at
