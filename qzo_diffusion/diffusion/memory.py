"""Estimate the memory of each phase of a run from configs and headers alone.

Weights are counted. The rest of a forward pass is a formula of tokens and widths; its factors were
measured on a CPU. A test compares the plan with a measured peak.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qzo_diffusion import devices
from qzo_diffusion.core.quzo import BLOCK
from qzo_diffusion.core.remembered import BLOCK as BLOCK_OF_STATE
from qzo_diffusion.core.scales import OVERRIDDEN_AT_ONCE, overridden_at_once
from qzo_diffusion.diffusion.autoencoders import kind_of
from qzo_diffusion.quant.base import linears_to_quantize
from qzo_diffusion.quant.entries import Entry
from qzo_diffusion.quant.fits import slots_of
from qzo_diffusion.quant.gguf_entries import blocks_of_row
from qzo_diffusion.quant.stream import Quantization
from qzo_diffusion.quant.svdquant import RANK

# bytes of a process after all imports, and of a CUDA context
# measured on a CPU and on an H200; the others are taken to be alike
LIBRARIES = {"cpu": 0.87e9, "cuda": 0.6e9, "xpu": 0.6e9, "mps": 0.6e9}
# tensors of all tokens at the peak of a block: residuals, norms, and q, k, v separate and joined
HIDDEN_STATES = 16
# bytes of temporary tensors while the CPU quantizes a part of a weight; a GPU takes a whole weight
QUANTIZING = 32e6
STATE = {
    "sgd": 0,
    "momentum": 1,
    "adam": 2,
}  # numbers that an optimizer keeps for each number of theta


@dataclass(frozen=True)
class ModelSize:
    """Bytes of a model in memory, and the sizes of its largest layer."""

    weights: float
    scales: int
    largest: int  # weights of the largest quantized layer
    rows: int  # outputs of all quantized layers
    block_columns: int
    width: int

    @classmethod
    def of(
        cls, model: nn.Module, how: Quantization, dtype: torch.dtype, width: int = 0
    ) -> "ModelSize":
        """Measure a model on the meta device that will be quantized."""
        chosen = dict(linears_to_quantize(model, how.skip, how.columns))
        # one byte for each weight and one scale for each output
        of_rows, blocksize = how.quant_type in ("int8", "fp8"), how.blocksize
        branched = how.quant_type == "svdquant"
        in_bytes = of_rows or (how.backend == "reference" and not branched)
        code_bytes = 1.0 if in_bytes else 0.5
        quantized = {id(linear.weight) for linear in chosen.values()}
        plain = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in quantized]
        numel = sum(linear.weight.numel() for linear in chosen.values())
        rows = sum(linear.out_features for linear in chosen.values())
        scales = rows if of_rows else numel // blocksize
        weights = (
            numel * code_bytes
            + 4 * scales
            + (_of_branches(chosen.values(), blocksize) if branched else 0)
            + sum(tensor.numel() for tensor in plain) * dtype.itemsize
        )
        return cls(
            weights,
            scales,
            max((linear.weight.numel() for linear in chosen.values()), default=0),
            rows,
            sum(linear.in_features // blocksize for linear in chosen.values()),
            width,
        )

    @classmethod
    def of_files(
        cls,
        model: nn.Module,
        entries: Mapping[str, Entry],
        how: Quantization,
        dtype: torch.dtype,
        width: int = 0,
    ) -> "ModelSize":
        """Measure a model that is read from `entries`: layers in the blocks of a GGUF file stay in
        them, and then no other is quantized.
        """
        blocks = {name: entry for name, entry in entries.items() if entry.blocks}
        if not blocks:
            return cls.of(model, how, dtype, width)
        plain = [t for name, t in slots_of(model).items() if name not in blocks]
        columns = {name: blocks_of_row(entry) for name, entry in blocks.items()}
        scales = sum(entry.shape[0] * columns[name] for name, entry in blocks.items())
        return cls(
            sum(entry.nbytes for entry in blocks.values())
            + 4 * scales
            + sum(tensor.numel() for tensor in plain) * dtype.itemsize,
            scales,
            max(math.prod(entry.shape) for entry in blocks.values()),
            sum(entry.shape[0] for entry in blocks.values()),
            sum(columns.values()),
            width,
        )


def _of_branches(linears: Iterable[nn.Linear], blocksize: int) -> float:
    """Bytes of SVDQuant's branches of 16 bits, and of the zeros beside the scales."""
    return sum(
        linear.in_features * linear.out_features * 4 / blocksize
        + 2 * RANK * (linear.in_features + linear.out_features)
        for linear in linears
    )


@dataclass(frozen=True)
class Phase:
    """One phase; `parts` are bytes by purpose."""

    name: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class MethodPeak:
    """The bytes of a run with one method. whole: of its highest phase. train: of its steps."""

    whole: float
    train: float


@dataclass(frozen=True)
class MemoryPlan:
    """All phases of a run on one device.

    available: bytes that are free, None if that is unknown. methods: the peaks by method, one image
    at once, where there is a choice.
    """

    phases: list[Phase]
    device: str
    available: float | None = None
    changes: list[str] = field(default_factory=list)  # settings that would make it fit
    methods: Mapping[str, MethodPeak] = field(default_factory=dict)

    @property
    def peak(self) -> float:
        return max(phase.total for phase in self.phases)

    @property
    def fits(self) -> bool:
        return self.available is None or self.peak <= self.available

    def describe(self) -> str:
        lines = [f"memory    {'phase':8} {'GB':>6}   on {self.device}"]
        for phase in self.phases:
            parts = ", ".join(
                f"{name} {size / 1e9:.2f}" for name, size in phase.parts.items() if size >= 5e6
            )
            lines.append(f"          {phase.name:8} {phase.total / 1e9:6.2f}   {parts}")
        if self.available is not None:
            lines.append(
                f"          free     {self.available / 1e9:6.2f}   "
                f"{'enough' if self.fits else 'TOO LITTLE'}"
            )
        if self.methods:
            peaks = ", ".join(
                f"{name} {one.whole / 1e9:.2f} (steps {one.train / 1e9:.2f})"
                for name, one in self.methods.items()
            )
            lines.append(f"          methods  {peaks} at the least: docs/models.md")
        if not self.fits:
            nothing = "no setting makes it fit; use a larger device or a smaller model"
            lines.append(
                f"          change   {' '.join(self.changes)}"
                if self.changes
                else f"          {nothing}"
            )
        return "\n".join(lines)

    def facts(self) -> dict[str, Any]:
        """Return the plan for `--json`."""
        phases = {
            phase.name: {name: round(size / 1e9, 3) for name, size in phase.parts.items()}
            for phase in self.phases
        }
        return {
            "phases_gb": phases,
            "peak_gb": round(self.peak / 1e9, 3),
            "fits": self.fits,
            "changes": self.changes,
            "methods_gb": {name: round(one.whole / 1e9, 3) for name, one in self.methods.items()},
            "methods_train_gb": {
                name: round(one.train / 1e9, 3) for name, one in self.methods.items()
            },
        }


def forward_bytes(
    size: ModelSize, image_tokens: int, text_tokens: int, batch: int, dtype: torch.dtype
) -> float:
    """Return the bytes of one forward pass beside the weights: hidden states, and the largest
    weight dequantized.
    """
    hidden = HIDDEN_STATES * batch * (image_tokens + text_tokens) * size.width * dtype.itemsize
    return hidden + size.largest * dtype.itemsize


def override_bytes(size: ModelSize, parametrization: str, device: str) -> float:
    """Return the bytes that a step needs beside a forward pass: the overridden scales or codes of
    some layers, and temporary tensors for them.
    """
    if parametrization == "codes":
        return max(size.largest, OVERRIDDEN_AT_ONCE) + 6 * 4.0 * BLOCK
    return 3 * 4.0 * min(size.scales, overridden_at_once(size.scales, device))


def trained_bytes(size: ModelSize, parametrization: str, optimizer: str, state_bits: int) -> float:
    """Return the bytes of theta and of the optimizer's state. With `dense`, theta is the scales
    themselves.

    Args:
        state_bits: of each number of the state; fewer than 32 come with up to two fp32 numbers for
            a block.
    """
    own = {
        "layer": 0,
        "row": size.rows,
        "column": size.block_columns,
        "separable": size.rows + size.block_columns,
        "dense": 0,
    }
    if parametrization == "codes":
        return 0.0
    count = size.scales if parametrization == "dense" else own[parametrization]
    each = 4.0 if state_bits == 32 else state_bits / 8 + 2 * 4.0 / BLOCK_OF_STATE
    return 4.0 * own[parametrization] + STATE[optimizer] * count * each


def vae_bytes(
    config: Mapping[str, Any], direction: str, width: int, height: int, tile: int | None
) -> float:
    """Return the bytes for encoding or decoding one image beside the VAE, in fp32."""
    pixels = min(width, tile or width) * min(height, tile or height)
    kind = kind_of(config)
    maps = kind.maps(config)
    return kind.full_size[direction] * maps[min(1, len(maps) - 1)] * pixels * 4


def stored_bytes(entries: Mapping[str, Entry], dtype: torch.dtype) -> float:
    """Return the bytes in memory of a model that is stored on disk, with its floats in
    `dtype`.
    """
    return sum(
        entry.nbytes // entry.dtype.itemsize * dtype.itemsize
        for entry in entries.values()
        if entry.dtype.is_floating_point or entry.scale is not None
    )


def reading_bytes(
    entries: Mapping[str, Entry], dtype: torch.dtype, device: str, largest: int
) -> float:
    """Return the bytes of temporary tensors while a model is loaded: its largest tensor, its cast,
    and its quantization.
    """
    tensor = max(entry.nbytes for entry in entries.values())
    floats = [
        entry.nbytes // entry.dtype.itemsize
        for entry in entries.values()
        if entry.dtype not in (dtype, torch.uint8)
    ]
    cast = max(floats, default=0) * dtype.itemsize
    scaled = [entry.nbytes // entry.dtype.itemsize for entry in entries.values() if entry.scale]
    cast += 4 * max(scaled, default=0)  # converted by way of fp32
    return tensor + cast + (QUANTIZING if device == "cpu" else 6 * 4.0 * largest)


def least_bytes(
    size: ModelSize, entries: Mapping[str, Entry], dtype: torch.dtype, device: str
) -> float:
    """Return the bytes that any run needs: the libraries, the 4-bit weights, and the temporary
    tensors of loading.
    """
    return LIBRARIES[device] + size.weights + reading_bytes(entries, dtype, device, size.largest)


def available_bytes(device: torch.device) -> float | None:
    """Return the bytes that this process can use, None if that is unknown.

    On a GPU the driver knows them. On a CPU they are the memory that Linux calls available, and the
    memory that the process holds already.
    """
    free = devices.free_bytes(device)
    if free is not None:
        return float(free) + LIBRARIES[device.type]
    try:
        facts = dict(
            line.split(":", 1)
            for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        )
        own = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096
        return int(facts["MemAvailable"].split()[0]) * 1024.0 + own
    except (OSError, KeyError, ValueError, IndexError):
        return None
