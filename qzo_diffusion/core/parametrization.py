"""Parametrizations: they define theta, and compute the quantization scales from it.

In relative units θ = log(s / s0) is trained: eps and lr are fractions of a scale, the same for
every model and back-end, and scales stay positive. The paper's absolute units are kept for
comparison.

| class         | trained                              | scale in the forward  | update          |
|---------------|--------------------------------------|-----------------------|-----------------|
| Dense         | θ of each scale                      | s · exp(±ε z)         | s <- s · exp(δ) |
| DenseAbsolute | each scale                           | s ± ε z               | s <- max(s+δ,0) |
| Grouped       | one θ per layer, row or block column | s · exp(Σ θ ± ε z)    | θ <- θ + δ      |

A new class needs the methods of `Parametrization` and nothing else; estimator, optimizer and loop
do not know which one runs."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from qzo_diffusion.core.activation_scaling import ActivationScaling
from qzo_diffusion.core.noise import Direction
from qzo_diffusion.core.precision import where_float64_is
from qzo_diffusion.core.scales import Override, ScaleSet


class Parametrization(Protocol):
    scales: ScaleSet

    @property
    def scales_activations(self) -> bool:
        """Whether a change of θ scales inputs and outputs, so that examples can differ."""
        ...

    def templates(self) -> dict[str, Tensor]:
        """Tensors with the names, shapes, dtype and device of θ."""
        ...

    def perturbed(self, direction: Direction | None = None, radius: float = 0.0) -> Override | None:
        """The scales at θ + radius · z, for `ScaleSet.override`; at θ without a direction."""
        ...

    def probes(
        self, directions: Sequence[Direction], radii: Sequence[float]
    ) -> tuple[Override | None, ActivationScaling | None]:
        """Arguments of `ScaleSet.override` for one forward pass over several groups of examples.

        Each radius and direction has a group, all directions of the first radius before the next.
        Where directions have patch groups, token-wise layers divide each example's tokens into as
        many runs.

        Raises:
            ValueError: more than one group without `scales_activations`.
        """
        ...

    def combined(
        self, name: str, directions: Sequence[Direction], amounts: Sequence[float]
    ) -> Tensor:
        """Σ amounts[i] · z for the θ of one name, a new tensor.

        Each direction has an amount for each of its patch groups, one after the other.
        """
        ...

    def move_(self, directions: Sequence[Direction], amounts: Sequence[float]) -> None:
        """θ += Σ amounts[i] · z, as `combined`."""
        ...

    def add_(self, name: str, delta: Tensor) -> None:
        """θ of one name += delta."""
        ...

    def merge_(self) -> None:
        """Write θ into the live scales: a plain forward pass then sees it."""
        ...

    def state(self) -> dict[str, Tensor]:
        """θ itself (live tensors, not copies), enough to continue from."""
        ...

    def load_state_(self, state: dict[str, Tensor]) -> None: ...


def exp(theta: Tensor) -> Tensor:
    """exp(θ) in float64, rounded once: in fp32 a CPU and a GPU give other bits."""
    return torch.exp(where_float64_is(theta).double()).to(theta.dtype).to(theta.device)


def only_probe(
    theta: Parametrization, directions: Sequence[Direction], radii: Sequence[float]
) -> tuple[Override | None, None]:
    """`probes` of a parametrization that does not scale activations.

    Raises:
        ValueError: more than one group.
    """
    if len(directions) * len(radii) != 1:
        raise ValueError(
            "only rows, columns and layers can be probed along several directions in one forward"
        )
    return theta.perturbed(directions[0], radii[0]), None


def tuned_scales(theta: Parametrization) -> dict[str, Tensor]:
    """The scales of all layers at θ; nothing is merged or changed."""
    override, tuned = theta.perturbed(), theta.scales.tensors()
    for chunk in theta.scales.chunks() if override is not None else ():
        tuned |= override(chunk)  # type: ignore[misc]
    return tuned


def copy_by_name_(target: dict[str, Tensor], source: dict[str, Tensor]) -> None:
    """Copy tensors by name; raises ValueError when names or shapes differ."""
    if target.keys() != source.keys():
        raise ValueError(
            f"state of another parametrization: {sorted(target.keys() ^ source.keys())[:3]}"
        )
    for name, tensor in target.items():
        if tensor.shape != source[name].shape:
            raise ValueError(
                f"state of another parametrization: {name} has {tuple(source[name].shape)}, not "
                f"{tuple(tensor.shape)}"
            )
    for name, tensor in target.items():
        tensor.copy_(source[name])
