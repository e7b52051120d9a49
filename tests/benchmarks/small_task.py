"""A task of two quantized linears, on which the convergence benchmark's cells take a moment."""

from collections.abc import Iterable
from dataclasses import replace

from benchmarks.convergence.cells import Folders
from benchmarks.convergence.methods import (
    FAMILIES,
)
from benchmarks.convergence.settings import Cell
from qzo_diffusion.core.probing import StepBatch
from qzo_diffusion.quant.load import handles_of
from tests.quantized import inputs, scaled_network, squared_output


class SmallTask:
    """Two quantized linears whose output is to vanish."""

    def __init__(self, backend="reference"):
        self.model, self.scales = scaled_network(backend)
        self.held_out = [inputs(8, seed=99)]
        self.token_wise = ["0"]

    def objective(self, micro_batch):
        return squared_output(self.model)(micro_batch)

    def batches(self, seed, batch, patch_groups, sigma):
        return lambda step: StepBatch([inputs(batch, seed=1000 * seed + step)])

    def handles(self) -> Iterable:
        return handles_of(self.model)


def small(name, exponent, steps=50, **changes):
    """A cell of the table's method `name` with fewer examples."""
    method = replace(FAMILIES[name].at(exponent), batch=2, **changes)
    return Cell(
        "fluent_mono", replace(method, budget=steps * method.cost_of_step + method.calibration), 3
    )


def folders(tmp_path, name="one"):
    return Folders(tmp_path / name / "results", tmp_path / name / "cache")
