"""Which numbers are trained, and how the quantization scales follow from them.

In relative units a trained number is θ = log(s / s0): eps and lr are then fractions of a scale, the
same for every model and back-end, and a scale stays positive. The absolute units of the paper are
kept so that the two can be compared in one run.

| class         | numbers                              | scale in the forward  | update          |
|---------------|--------------------------------------|-----------------------|-----------------|
| Dense         | one per scale                        | s · exp(±ε z)         | s <- s · exp(δ) |
| DenseAbsolute | one per scale                        | s ± ε z               | s <- max(s+δ,0) |
| Grouped       | one θ per layer, row or block column | s · exp(Σ θ ± ε z)    | θ <- θ + δ      |

A new level needs the methods of `Parametrization` and nothing else; estimator, optimizer and loop
do not know which one runs."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from qzo_diffusion.core.activation_scaling import ActivationScaling
from qzo_diffusion.core.noise import Direction
from qzo_diffusion.core.scales import Override, ScaleSet


class Parametrization(Protocol):
    scales: ScaleSet

    @property
    def scales_activations(self) -> bool:
        """Whether changes can be shown as factors of inputs and outputs, other ones for every
        example.
        """
        ...

    def templates(self) -> dict[str, Tensor]:
        """A tensor per name with the shape, dtype and device of the trained numbers."""
        ...

    def perturbed(self, direction: Direction | None = None, radius: float = 0.0) -> Override | None:
        """The scales at (numbers + radius · z) for `ScaleSet.showing`; without a direction, at the
        numbers themselves.
        """
        ...

    def probes(
        self, directions: Sequence[Direction], radii: Sequence[float]
    ) -> tuple[Override | None, ActivationScaling | None]:
        """The same for one forward over a group of examples for each radius and direction:
        arguments of `ScaleSet.showing`.

        All directions of the first radius come first. Where directions have regions, their examples
        are divided into as many runs of tokens in layers that treat tokens apart.

        Raises:
            ValueError: more than one group without `scales_activations`.
        """
        ...

    def combined(
        self, name: str, directions: Sequence[Direction], amounts: Sequence[float]
    ) -> Tensor:
        """Σ amounts[i] · z of one name's numbers, a new tensor.

        Each direction has as many amounts in a row as it has regions.
        """
        ...

    def move_(self, directions: Sequence[Direction], amounts: Sequence[float]) -> None:
        """numbers += Σ amounts[i] · z, as `combined`."""
        ...

    def add_(self, name: str, delta: Tensor) -> None:
        """numbers of `name` += delta."""
        ...

    def merge_(self) -> None:
        """Write everything into the live scales, so that the plain forward equals the viewed
        one.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """The trained numbers themselves (live, not copies), enough to continue from."""
        ...

    def load_state_(self, state: dict[str, Tensor]) -> None: ...


def exp(theta: Tensor) -> Tensor:
    """By float64, rounded once: the same bits on every machine, where those of fp32 differ between
    a CPU and a GPU.
    """
    return torch.exp(theta.double()).to(theta.dtype)


def only_probe(
    theta: Parametrization, directions: Sequence[Direction], radii: Sequence[float]
) -> tuple[Override | None, None]:
    """`probes` of numbers that have no gains.

    Raises:
        ValueError: more than one group.
    """
    if len(directions) * len(radii) != 1:
        raise ValueError(
            "only rows, columns and layers can be probed along several directions in one forward"
        )
    return theta.perturbed(directions[0], radii[0]), None


def tuned_scales(theta: Parametrization) -> dict[str, Tensor]:
    """The scales of all layers as a forward at the numbers sees them; nothing is merged or
    changed.
    """
    view, shown = theta.perturbed(), theta.scales.tensors()
    for chunk in theta.scales.chunks() if view is not None else ():
        shown |= view(chunk)  # type: ignore[misc]
    return shown


def copy_by_name_(target: dict[str, Tensor], source: dict[str, Tensor]) -> None:
    """Raises ValueError when names or shapes differ."""
    if target.keys() != source.keys():
        raise ValueError(f"state of other numbers: {sorted(target.keys() ^ source.keys())[:3]}")
    for name, tensor in target.items():
        if tensor.shape != source[name].shape:
            raise ValueError(
                f"state of other numbers: {name} has {tuple(source[name].shape)}, not "
                f"{tuple(tensor.shape)}"
            )
    for name, tensor in target.items():
        tensor.copy_(source[name])
