"""The cosine with the exact gradient that random directions allow, from exact gradients.

An estimate ĝ has the mean m and the noise V = E|ĝ - m|², summed over all θ. In many dimensions |ĝ|
hardly varies, so its mean cosine with the gradient g is

    cos = c(ν) · ⟨m, g⟩ / (|g| √(|m|² + V))                                              (1)

with c(ν) = √(2 / ν) Γ((ν + 1) / 2) / Γ(ν / 2), the mean of √(χ²/ν): few directions vary in length
together with their slopes. ν is the number of independent derivatives.

Let K directions estimate the derivative of one loss along D numbers whose own part of the gradient
is h, while the slope s along a direction of all numbers has the variance S = E[s²]. The mean of
s z, or with leave-one-out the sample covariance of s and z, has the noise (Rademacher; Gaussian z
add 2 |h|² / K)

    antithetic      V(D, S, h) = (D S - |h|²) / K
    leave one out   V(D, S, h) = D S / (K - 1) - |h|² (K - 2) / (K (K - 1))              (2)

Each kind of θ has a V of its own:

* Shared directions: one loss, the batch's: S = |g|² and h = g. Then (1) is nearly √(K / (K + D)).
* Directions of each of B examples: V = Σ_i V(D, |g_i|², g_i) / B². The gradients of examples g_i
  count, not their mean g: they may be much longer, and what cancels in g does not cancel in V.
* P patch groups: the derivative of L[i, p] along its own z measures only h[i, p, p]. Effects
  h[i, p, q] on it of other patch groups q, through attention, are noise, and so are those of
  layers with one z for the whole example. With G[i, p] the gradient of L[i, p] for these layers:

      token-wise   V = Σ_ip V(D_t, |G[i, p]|² + Σ_q |h[i, p, q]|², h[i, p, p]) / (B P)²
                   m = Σ_ip h[i, p, p] / (B P),   while g = Σ_ipq h[i, p, q] / (B P)
      others       V = Σ_i V(D_o, |G_i|² + Σ_q |h_iq|², G_i) / B²,   m = g = Σ_i G_i / B
                   with G_i = Σ_p G[i, p] / P and h_iq = Σ_p h[i, p, q] / P

Normalisation divides a whole step and leaves (1) as it is. Clipping and terms of the order of ε are
left out: curvature adds to the noise of leave-one-out where ε is large.

Source of (2): the variance of a sample covariance; of its special case √(K / (K + D)): Nesterov and
Spokoiny 2017, doi 10.1007/s10208-015-9296-2."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qzo_diffusion.core.dense import Dense
from qzo_diffusion.core.grouped import Grouped
from qzo_diffusion.core.oracle import (
    DifferentiableHandle,
    exact_gradient,
    patch_group_gradients,
)
from qzo_diffusion.core.probes import Batch, Objective
from qzo_diffusion.core.probing import Probing, StepBatch

Squares = Tensor | float


@dataclass
class Moments:
    """Mean and noise of an estimate beside the gradient; vectors by the name of θ.

    Attributes:
        gradient: g. target: m. noise: V, in squared units of the gradient.
    """

    gradient: dict[str, Tensor] = field(default_factory=dict)
    target: dict[str, Tensor] = field(default_factory=dict)
    noise: float = 0.0

    def cosine(self) -> float:
        """⟨m, g⟩ / (|g| √(|m|² + V)); NaN for a gradient of zeros."""
        product, of_g, of_m = (
            math.fsum(float((a[name].double() * b[name].double()).sum()) for name in self.gradient)
            for a, b in (
                (self.target, self.gradient),
                (self.gradient, self.gradient),
                (self.target, self.target),
            )
        )
        return product / math.sqrt(of_g * (of_m + self.noise)) if of_g else math.nan


def expected_cosine(
    objective: Objective[Batch],
    batch: StepBatch[Batch],
    theta: Dense | Grouped,
    handles: Callable[[], Iterable[DifferentiableHandle]],
    probing: Probing,
) -> float:
    """The mean cosine of a step's estimate with the exact gradient of its batch, formula (1).

    Args:
        objective: one loss for each example, or one for each patch group of it.
        handles: all quantized layers of the model.

    Directions of examples take a backward pass for each patch group.
    """
    if probing.per_example and isinstance(theta, Grouped):
        found = _of_examples(objective, batch, theta, handles, probing)
    else:
        found = _of_shared(
            exact_gradient(objective, batch.micro_batches, theta, handles()), probing
        )
    return length_correction(independent_derivatives(batch, probing)) * found.cosine()


def independent_derivatives(batch: StepBatch[Batch], probing: Probing) -> int:
    """ν of formula (1): one direction less where directions are compared with each other."""
    count = probing.num_directions - (probing.estimator == "leave_one_out")
    return count * (batch.whole * batch.patch_groups if probing.per_example else 1)


def length_correction(count: int) -> float:
    """c(ν): 0.80 for one direction, 0.97 for eight, 1 for many."""
    log_ratio = math.lgamma((count + 1) / 2) - math.lgamma(count / 2)
    return math.sqrt(2 / count) * math.exp(log_ratio)


def noise(probing: Probing, numbers: int, slope: Squares, own: Squares) -> Squares:
    """V(D, S, h), formula (2).

    Args:
        numbers: D. slope: S. own: |h|². The last two may hold one value for each loss.
    """
    count = probing.num_directions
    gaussian = 2 * own / count if probing.distribution == "gaussian" else 0.0
    if probing.estimator == "antithetic":
        return (numbers * slope - own) / count + gaussian
    known = own * ((count - 2) / (count * (count - 1)))
    return numbers * slope / (count - 1) - known + gaussian


def _of_shared(gradient: Mapping[str, Tensor], probing: Probing) -> Moments:
    square = math.fsum(float(one.double().square().sum()) for one in gradient.values())
    numbers = sum(one.numel() for one in gradient.values())
    found = float(noise(probing, numbers, square, square))
    return Moments(dict(gradient), dict(gradient), found)


def _of_examples(
    objective: Objective[Batch],
    batch: StepBatch[Batch],
    theta: Grouped,
    handles: Callable[[], Iterable[DifferentiableHandle]],
    probing: Probing,
) -> Moments:
    kinds = {
        token_wise: [key for key in theta.templates() if theta.is_token_wise(key) == token_wise]
        for token_wise in (False, True)
    }
    total = Moments()
    for micro_batch in batch.micro_batches:
        groups = patch_group_gradients(objective, micro_batch, theta, handles(), batch.patch_groups)
        _add_(total, _Examples.of(groups, kinds[True], batch.patch_groups), kinds, probing)
    for vectors in (total.gradient, total.target):
        for vector in vectors.values():
            vector.div_(batch.whole)
    total.noise /= batch.whole**2
    return total


@dataclass
class _Examples:
    """Gradients of the examples of a micro-batch.

    Attributes:
        mean: gradients of the examples' losses, {key: [B, groups, n]}.
        own: the sum over p of h[i, p, p] / P, {key: [B, n]}, of token-wise keys.
        squares: |·|² of the whole gradient of L[i, p] for θ of every patch group, [B, P].
        own_squares: |h[i, p, p]|², [B, P]; zeros without token-wise layers.
    """

    mean: dict[str, Tensor]
    own: dict[str, Tensor]
    squares: Tensor
    own_squares: Tensor

    @classmethod
    def of(
        cls, gradients: Iterable[Mapping[str, Tensor]], token_wise: Sequence[str], groups: int
    ) -> "_Examples":
        mean: dict[str, Tensor] = {}
        own: dict[str, Tensor] = {}
        squares, own_squares = [], []
        for place, found in enumerate(gradients):
            diagonal = {key: found[key][:, place] for key in token_wise}
            _add_to(mean, found, groups)
            _add_to(own, diagonal, groups)
            squares.append(_squares(found))
            own_squares.append(_squares(diagonal) if diagonal else torch.zeros_like(squares[-1]))
        return cls(mean, own, torch.stack(squares, 1), torch.stack(own_squares, 1))


def _add_to(into: dict[str, Tensor], found: Mapping[str, Tensor], divisor: int) -> None:
    for key, one in found.items():
        into[key] = into[key] + one / divisor if key in into else one / divisor


def _squares(gradients: Mapping[str, Tensor]) -> Tensor:
    """[B]: the squared length over all keys."""
    parts = [one.double().square().flatten(1).sum(1) for one in gradients.values()]
    return torch.stack(parts).sum(0)


def _add_(
    total: Moments, found: _Examples, kinds: Mapping[bool, Sequence[str]], probing: Probing
) -> None:
    """Add the sums over the examples of a micro-batch."""
    whole = {key: one.sum((0, 1)) for key, one in found.mean.items()}
    own = {key: one.sum(0) for key, one in found.own.items()}
    _add_to(total.gradient, whole, 1)
    _add_to(total.target, whole | own, 1)
    numbers = {kind: sum(found.mean[key].shape[-1] for key in kinds[kind]) for kind in kinds}
    if numbers[True]:
        groups = found.squares.shape[1]
        of_groups = noise(probing, numbers[True], found.squares, found.own_squares)
        total.noise += float(torch.as_tensor(of_groups).sum()) / groups**2
    if numbers[False]:
        others = _squares({key: found.mean[key] for key in kinds[False]})
        of_examples = noise(probing, numbers[False], _squares(found.mean), others)
        total.noise += float(torch.as_tensor(of_examples).sum())
