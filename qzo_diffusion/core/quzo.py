"""QuZO: integer codes are trained themselves, with no copy of a weight in floating point (arXiv
2502.12346).

With c the codes, u a random direction, and Q(x) = floor(x) + Bernoulli(x - floor(x)), so that
E[Q(x)] = x:

    p = Q1(ε u);   μ = (L(clamp(c + p)) - L(clamp(c - p))) / 2ε
    c <- c - Σ Q(η μ / n · Q2(u))        over n directions

Q1 and Q2 round the same u with independent randomness, so E[p Q2(u)ᵀ] / ε = I; one rounding used
twice would be biased. Everything is in units of a code. A code that would leave its range stays as
it is. Var(p / ε) grows as 1 / ε for ε below a code, so a probe may also use c ± ε u in floating
point, a layer at a time ("float").

Most updates are far below one code: rounded at random they are a random walk, rounded to nearest
they are lost. Error feedback (arXiv 2602.03120) carries what rounding left, e, to the next step:

    v = -η ĝ + γ e;   c <- c + round(v);   e = v - round(v)

and e is not stored but computed again from the seeds and scalars of the last steps, as if nothing
was left before them: near to what was left, not equal, as γ^40 is 0.13. Here ĝ is divided by the
running rms of μ, so η is the length of a typical step in codes, for any loss and format.

All noise is drawn in blocks of 2^18 codes, each with its own key: a step needs a few MB beyond the
codes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from qzo_diffusion.core.noise import Direction
from qzo_diffusion.core.optimizer import RunningRms, Update
from qzo_diffusion.core.parametrization import Parametrization, copy_by_name_, only_probe
from qzo_diffusion.core.rounding import stochastic_round
from qzo_diffusion.core.scales import Override, ScaleSet

BLOCK = 2**18  # codes at a time; even, since two may share a byte
Probe = Literal["codes", "float"]


class Grid(Protocol):
    """Storage of codes, in the order of the weights that they stand for."""

    low: int
    high: int
    per_byte: int

    def codes(self, stored: Tensor) -> Tensor:
        """Any slice of the stored bytes -> fp32 codes, `per_byte` for each byte; flat."""
        ...

    def stored(self, codes: Tensor) -> Tensor:
        """The inverse; codes are whole numbers within the range."""
        ...


class Move(NamedTuple):
    """codes += Σ amounts[i] · Q2(u_i), before it is rounded."""

    directions: tuple[Direction, ...]
    amounts: tuple[float, ...]


class Codes:
    """Train every code of every layer.

    Args:
        scales: the live codes as they are stored, in the place of scales.
        grids: how each layer stores them.
        trained: names of the layers that take part; None is all.
        probe: whether a forward pass uses rounded codes or c ± ε u itself.
    """

    scales_activations = False

    def __init__(
        self,
        scales: ScaleSet,
        grids: Mapping[str, Grid],
        trained: Sequence[str] | None = None,
        probe: Probe = "codes",
    ) -> None:
        self.scales, self._grids, self._probe = scales, grids, probe
        self._trained = {name: scales[name] for name in (scales if trained is None else trained)}

    def templates(self) -> dict[str, Tensor]:
        return self._trained

    def perturbed(self, direction: Direction | None = None, radius: float = 0.0) -> Override | None:
        if direction is None:
            return None

        def override(names: Sequence[str]) -> dict[str, Tensor]:
            return {
                name: self._probed(name, direction, radius)
                for name in names
                if name in self._trained
            }

        return override

    def _probed(self, name: str, direction: Direction, radius: float) -> Tensor:
        """The layer's codes at ±ε: as they are stored, or fp32 [N, K]."""
        grid, live = self._grids[name], self._trained[name]
        if self._probe == "float":
            probed = torch.empty(live.shape[0], live.shape[1] * grid.per_byte, device=live.device)
        else:
            probed = torch.empty_like(live)
        for index, part in self._blocks(name):
            codes = grid.codes(live.view(-1)[part])
            u = _direction(direction, name, index, codes)
            if self._probe == "float":
                place = slice(part.start * grid.per_byte, part.stop * grid.per_byte)
                probed.view(-1)[place] = codes.add_(u.mul_(radius))
                continue
            p = stochastic_round(u.mul_(abs(radius)), *_key(direction, name, index), "probe")
            codes = codes.add_(p) if radius > 0 else codes.sub_(p)
            probed.view(-1)[part] = grid.stored(codes.clamp_(grid.low, grid.high))
        return probed

    def _blocks(self, name: str) -> Iterator[tuple[int, slice]]:
        """Index of each block, and its slice of the stored bytes, flat."""
        total, size = self._trained[name].numel(), BLOCK // self._grids[name].per_byte
        return (
            (index, slice(start, min(start + size, total)))
            for index, start in enumerate(range(0, total, size))
        )

    def probes(
        self, directions: Sequence[Direction], radii: Sequence[float]
    ) -> tuple[Override | None, None]:
        return only_probe(self, directions, radii)

    def combined(
        self, name: str, directions: Sequence[Direction], amounts: Sequence[float]
    ) -> Tensor:
        """Σ amounts[i] · Q2(u_i), fp32 [N, K]: an update before it is rounded."""
        grid, live = self._grids[name], self._trained[name]
        total = torch.empty(live.shape[0], live.shape[1] * grid.per_byte, device=live.device)
        for index, part in self._blocks(name):
            place = total.view(-1)[part.start * grid.per_byte : part.stop * grid.per_byte]
            place.copy_(self._wanted(name, index, part, Move(tuple(directions), tuple(amounts))))
        return total

    def move_(self, directions: Sequence[Direction], amounts: Sequence[float]) -> None:
        """codes += Σ Q(amounts[i] · Q2(u_i))."""
        for name in self._trained:
            for index, part in self._blocks(name):
                change: Tensor | None = None
                for direction, amount in zip(directions, amounts, strict=True):
                    u = _rounded_direction(
                        direction, name, index, self._trained[name], self._size(name, part)
                    )
                    one = stochastic_round(u.mul_(amount), *_key(direction, name, index), "move")
                    change = one if change is None else change.add_(one)
                if change is not None:
                    self._add_(name, part, change)

    def move_with_feedback_(self, past: Sequence[Move], now: Move, decay: float) -> None:
        """codes += round(v) for v = Σ amounts[i] · Q2(u_i) + decay · e.

        e is the rounding error of the `past` moves, oldest first. Updates blocked at the range
        limit are dropped, not carried over: e depends on seeds and scalars alone.
        """
        signs = all(
            direction.distribution == "rademacher" for move in past for direction in move.directions
        )
        for name in self._trained:
            for index, part in self._blocks(name):
                left, bound = self._zeros(name, part), 0.0
                for move in past:
                    left.mul_(decay).add_(self._wanted(name, index, part, move))
                    bound = decay * bound + sum(map(abs, move.amounts))
                    if signs and bound < 0.5:  # all of it is below one half
                        continue
                    left.sub_(left.round())
                    bound = 0.5
                self._add_(
                    name, part, left.mul_(decay).add_(self._wanted(name, index, part, now)).round_()
                )

    def _wanted(self, name: str, index: int, part: slice, move: Move) -> Tensor:
        total: Tensor | None = None
        for direction, amount in zip(move.directions, move.amounts, strict=True):
            one = _rounded_direction(
                direction, name, index, self._trained[name], self._size(name, part)
            ).mul_(amount)
            total = one if total is None else total.add_(one)
        assert total is not None
        return total

    def _zeros(self, name: str, part: slice) -> Tensor:
        return torch.zeros(self._size(name, part), device=self._trained[name].device)

    def _size(self, name: str, part: slice) -> int:
        return int(part.stop - part.start) * self._grids[name].per_byte

    def _add_(self, name: str, part: slice, change: Tensor) -> None:
        """Add whole numbers; a code that would leave its range stays."""
        grid, place = self._grids[name], self._trained[name].view(-1)[part]
        codes = grid.codes(place)
        moved = change.add_(codes)
        place.copy_(
            grid.stored(torch.where((moved >= grid.low) & (moved <= grid.high), moved, codes))
        )

    def add_(self, name: str, delta: Tensor) -> None:
        raise ValueError("codes move in whole steps; use optimizer sgd or feedback")

    def merge_(self) -> None:
        """Nothing to do: forward passes read the codes themselves."""

    def state(self) -> dict[str, Tensor]:
        return self._trained

    def load_state_(self, state: dict[str, Tensor]) -> None:
        copy_by_name_(self.state(), state)


class ErrorFeedback:
    """Normalised SGD on codes that carries rounding errors on to the next step; see above.

    Args:
        decay: γ.
        steps: how many past steps e is computed from; earlier ones count as none.
        rms_decay: of the running mean of μ².
    """

    def __init__(self, decay: float = 0.95, steps: int = 40, rms_decay: float = 0.95) -> None:
        self.decay, self.steps = decay, steps
        self._past: list[Move] = []
        self._rms = RunningRms(rms_decay)

    def step_(self, parametrization: Parametrization, update: Update) -> None:
        if not isinstance(parametrization, Codes):
            raise ValueError("optimizer feedback is for integer codes; scales need none")
        count = len(update.projected_grad)
        unit = self._rms.after(math.fsum(g * g for g in update.projected_grad) / count) * count
        now = Move(update.directions, tuple(-update.lr * g / unit for g in update.projected_grad))
        parametrization.move_with_feedback_(self._past, now, self.decay)
        self._past = [*self._past, now][-self.steps :]

    def state(self) -> dict[str, Tensor]:
        """Seeds and scalars alone: int64 [steps, n, 4], float64 [steps, n] and [2].

        n is the most directions of a step. A step of fewer is filled up with NaN as amounts.
        """
        if not self._past:
            return {}
        most = max(len(move.amounts) for move in self._past)
        facts = torch.zeros(len(self._past), most, 4, dtype=torch.int64)
        amounts = torch.full((len(self._past), most), math.nan, dtype=torch.float64)
        for place, move in enumerate(self._past):
            facts[place, : len(move.amounts)] = torch.tensor(
                [
                    (d.seed, d.step, d.index, int(d.distribution == "gaussian"))
                    for d in move.directions
                ]
            )
            amounts[place, : len(move.amounts)] = torch.tensor(move.amounts, dtype=torch.float64)
        return {"directions": facts, "amounts": amounts, "spread": self._rms.state()}

    def load_state_(self, state: dict[str, Tensor]) -> None:
        self._past = []
        self._rms.load_state_(state.get("spread"))
        if state:
            rows = zip(state["directions"].tolist(), state["amounts"].tolist(), strict=True)
            self._past = [_move(facts, amounts) for facts, amounts in rows]


def _move(facts: list[list[int]], amounts: list[float]) -> Move:
    """A step of `ErrorFeedback.state`, without what lies behind its last direction."""
    kept = [
        (Direction(seed, step, index, "gaussian" if gaussian else "rademacher"), amount)
        for (seed, step, index, gaussian), amount in zip(facts, amounts, strict=True)
        if not math.isnan(amount)
    ]
    return Move(tuple(direction for direction, _ in kept), tuple(amount for _, amount in kept))


def _key(direction: Direction, name: str, index: int) -> tuple[int | str, ...]:
    return direction.seed, direction.step, direction.index, _block_name(name, index)


def _block_name(name: str, index: int) -> str:
    return f"{name}[{index}]"


def _direction(direction: Direction, name: str, index: int, like: Tensor) -> Tensor:
    """u of one block."""
    return direction.z(_block_name(name, index), like)


def _rounded_direction(
    direction: Direction, name: str, index: int, like: Tensor, numel: int | None = None
) -> Tensor:
    """Q2(u) of one block, fp32; signs need no rounding."""
    flat = like.new_empty(like.numel() if numel is None else numel, dtype=torch.float32)
    u = _direction(direction, name, index, flat)
    return (
        u
        if direction.distribution == "rademacher"
        else stochastic_round(u, *_key(direction, name, index), "direction")
    )
