"""Small quantized networks for tests: every back-end under one name each."""

import torch
from torch import Tensor, nn

from qzo_diffusion.core.probing import Probing, StepBatch
from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.core.spsa import estimate, no_reduce
from qzo_diffusion.quant.load import find_scales, quantize_

BACKENDS = [
    (backend, quant_type, blocksize)
    for backend in ("reference", "bnb")
    for quant_type in ("nf4", "fp4")
    for blocksize in (32, 64, 128)
] + [("reference", "bof4s", 64)]
GRID_BACKENDS = [("intgrid", "int8", 128), ("intgrid", "int4", 32), ("intgrid", "fp8", 128)]


def network(
    backend: str = "reference",
    quant_type: str = "nf4",
    blocksize: int = 64,
    *,
    width: int = 128,
    out: int = 8,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> nn.Sequential:
    """Two quantized linears with a smooth function between them, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out)).to(dtype)
    for parameter in model.parameters():
        parameter.data = (
            torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / width**0.5
        ).to(dtype)
    quantize_(model, quant_type=quant_type, blocksize=blocksize, backend=backend)
    return model.eval()


def inputs(
    count: int = 6, width: int = 128, dtype: torch.dtype = torch.float32, seed: int = 1
) -> Tensor:
    return torch.randn(
        count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def squared_output(model: nn.Module):
    """An objective: one loss per example."""
    return lambda x: model(x).square().mean(-1)


def estimated(
    objective,
    micro_batches,
    theta,
    directions,
    *,
    first_example=0,
    examples=None,
    sum_over_ranks=no_reduce,
    **probing,
):
    """`core.spsa.estimate` of a few micro-batches along some directions."""
    batch = StepBatch(micro_batches, first_example=first_example, examples=examples)
    return estimate(objective, batch, theta, directions, Probing(0, **probing), sum_over_ranks)


def snapshot(model: nn.Module, scales: ScaleSet) -> dict[str, Tensor]:
    """Copies of everything that must not change: live scales and every parameter and buffer (codes
    among them).
    """
    state = {f"scales.{name}": scales[name].clone() for name in scales}
    state |= {f"parameter.{name}": p.detach().clone() for name, p in model.named_parameters()}
    return state | {f"buffer.{name}": b.detach().clone() for name, b in model.named_buffers()}


def assert_same(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


def scaled_network(*args, **options) -> tuple[nn.Sequential, ScaleSet]:
    model = network(*args, **options)
    return model, find_scales(model)
