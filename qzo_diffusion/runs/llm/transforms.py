"""Load a language model whose layers' inputs are mapped before it is quantized."""

from dataclasses import replace

import torch
from torch import nn

from qzo_diffusion.llm.decoder import HEAD, Decoder, decoder_of
from qzo_diffusion.llm.transform import Transform, install_, rotated, transformed_entries
from qzo_diffusion.quant.fits import check_fits, named_as_in
from qzo_diffusion.quant.hadamard import hadamard_map
from qzo_diffusion.quant.kronecker import product
from qzo_diffusion.quant.stream import Quantization
from qzo_diffusion.runs.loading import Source, load_quantized


def load_transformed(
    source: Source, how: Quantization, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """Load the model quantized, as `load_quantized` does. No copy of it is kept on disk.

    Raises:
        ModelError: it is no decoder of a known kind, or see `quant.stream.fill_`.
    """
    empty = source.make_empty()
    entries = named_as_in(empty, source.entries)
    check_fits(empty, entries)
    transform = hadamard(decoder_of(empty, tied=f"{HEAD}.weight" not in entries))
    changed = replace(source, entries=transformed_entries(entries, transform))
    model = load_quantized(changed, how, dtype=dtype, device=device)
    install_(model, transform, dtype)
    return model


def hadamard(sizes: Decoder) -> Transform:
    """Return the rotations by randomized Hadamard matrices, the same ones for every run."""
    of_head = hadamard_map(sizes.head)
    head = product(torch.diag(of_head.scale), of_head.left, of_head.right)
    residual, inner = hadamard_map(sizes.width), hadamard_map(sizes.inner)
    return rotated(sizes, residual, [head] * sizes.blocks, inner)
