"""FlatQuant (arXiv 2410.09426): an invertible map in front of every layer, learned on a text.

    x Wᵀ  ->  Q(x T) Q(W T⁻ᵀ)ᵀ      T = diag(scale) (left ⊗ right), Q rounds to 4 bits

T makes the layer's error least: a token's squared error over its squared output, by Adam through
the rounding, whose derivative counts as one. Layers that read the same input share
T. It is smaller than the paper's: layers are fitted one by one on the inputs of the unquantized
model and not block by block, and no thresholds of clipping are learned."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from qzo_diffusion.llm import decoder as parts
from qzo_diffusion.llm.calibration import layer_inputs
from qzo_diffusion.llm.decoder import Decoder
from qzo_diffusion.llm.transform import Online, Transform
from qzo_diffusion.quant.hadamard import hadamard_map
from qzo_diffusion.quant.kronecker import KroneckerMap

STEPS, RATE = 30, 5e-3
ROWS, OUTPUTS = 128, 256  # tokens and outputs of a step, at most
LARGEST = 7  # of a number in 4 bits
SEED = 0
PARTS = ("scale", "left", "right")


@dataclass(frozen=True)
class Rounding:
    """Numbers that share a scale.

    weights: of a row. inputs: of a token, 0 for all of it, None where they are left as they are.
    """

    weights: int
    inputs: int | None


@dataclass(frozen=True)
class Site:
    """A place where inputs are mapped: a norm, or a layer that is the only reader of its input."""

    module: str
    layers: tuple[str, ...]

    @property
    def online(self) -> Literal["input", "output"]:
        return "input" if self.layers == (self.module,) else "output"


def sites(sizes: Decoder) -> Iterator[Site]:
    for name in sizes.names():
        for norm, layers in parts.NORMS.items():
            yield Site(f"{name}.{norm}", tuple(f"{name}.{layer}" for layer in layers))
        for layer in (parts.OUT_OF_ATTENTION, parts.OUT_OF_MLP):
            yield Site(f"{name}.{layer}", (f"{name}.{layer}",))


def learned(sizes: Decoder, model: Any, windows: Tensor, rounding: Rounding) -> dict[str, Tensor]:
    """Return the parts of the maps, float64: `<module>.scale`, `.left` and `.right`.

    Args:
        model: the unquantized model, on the CPU.
        windows: tokens of the calibration text, int64 [windows, tokens].
    """
    chosen = list(sites(sizes))
    inputs = layer_inputs(model, windows, [site.layers[0] for site in chosen])
    found = dict[str, Tensor]()
    for site in chosen:
        weights = [model.get_submodule(layer).weight.detach().float() for layer in site.layers]
        one = fitted(inputs[site.layers[0]], torch.cat(weights), rounding)
        found |= {f"{site.module}.{part}": getattr(one, part) for part in PARTS}
    return found


def transform(sizes: Decoder, tensors: Mapping[str, Tensor]) -> Transform:
    """Return the maps of a decoder from their parts."""
    inputs, online = dict[str, KroneckerMap](), dict[str, Online]()
    for site in sites(sizes):
        one = KroneckerMap(*(tensors[f"{site.module}.{part}"] for part in PARTS))
        online[site.module] = Online(one, at=site.online)
        inputs |= dict.fromkeys(site.layers, one.dual())
    return Transform(inputs=inputs, online=online)


def fitted(rows: Tensor, weight: Tensor, rounding: Rounding) -> KroneckerMap:
    """Return the map of the inputs of one weight, in float64; it begins as a Hadamard matrix.

    Args:
        rows: inputs, fp32 [M, K].
        weight: fp32 [N, K].
    """
    start = hadamard_map(rows.shape[1])
    numbers = [torch.zeros_like(start.scale), start.left, start.right]
    numbers = [one.float().requires_grad_() for one in numbers]
    adam = torch.optim.Adam(numbers, lr=RATE)
    generator = torch.Generator().manual_seed(SEED)
    for step in range(STEPS):
        tokens = torch.randperm(len(rows), generator=generator)[:ROWS]
        outputs = torch.randperm(len(weight), generator=generator)[:OUTPUTS]
        with torch.enable_grad():
            one = KroneckerMap(start.scale.float() * numbers[0].exp(), numbers[1], numbers[2])
            lost = relative_error(one, rows[tokens], weight[outputs], rounding)
        for number, slope in zip(numbers, torch.autograd.grad(lost, numbers), strict=True):
            number.grad = slope
        adam.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        adam.step()
    logs, left, right = (number.detach().double() for number in numbers)
    return KroneckerMap(start.scale * logs.exp(), left, right)


def relative_error(one: KroneckerMap, rows: Tensor, weight: Tensor, rounding: Rounding) -> Tensor:
    """Return the mean over tokens of |y - y of the rounded layer|² / |y|²."""
    wanted = rows @ weight.T
    dual = one.dual()
    mapped = one.of(rows)
    if rounding.inputs is not None:
        mapped = rounded(mapped, rounding.inputs or one.size)
    lost = mapped @ rounded(dual.of(weight), rounding.weights).T - wanted
    return (lost.square().sum(1) / wanted.square().sum(1).clamp(min=1e-12)).mean()


def rounded(tensor: Tensor, run: int) -> Tensor:
    """Round to -7 .. 7 times a scale for each `run` of the last dimension.

    Rounding itself counts as exact in the derivative; the scale has its own. `quant.branched`
    rounds alike and passes gradients as they are.
    """
    runs = tensor.unflatten(-1, (-1, run))
    scale = (runs.abs().amax(-1, keepdim=True) / LARGEST).clamp(min=1e-12)
    steps = runs / scale
    return ((steps + (steps.round() - steps).detach()) * scale).flatten(-2)
