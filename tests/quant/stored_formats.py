"""Weights rounded to the formats of GPTQ, AQLM and HQQ, as tensors of a file and as plain weights:
small ones, for tests.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qzo_diffusion.quant import gptq

GROUP = 16


def gptq_state(
    weight: Tensor, version: int = 1, act_order: bool = False, symmetric: bool = True
) -> tuple[dict[str, Tensor], Tensor]:
    """What a file holds of weight [N, K], and the weight that it stands for: both by the formula,
    column by column.
    """
    outputs, inputs = weight.shape
    g_idx = torch.arange(inputs) // GROUP
    if act_order:
        g_idx = g_idx[torch.randperm(inputs, generator=torch.Generator().manual_seed(1))]
    groups = inputs // GROUP
    # [G, N]
    scales = torch.stack([weight[:, g_idx == g].abs().amax(1) / 7 for g in range(groups)]).half()
    zeros = torch.full((groups, outputs), 8)
    if not symmetric:
        zeros = torch.randint(4, 12, (groups, outputs), generator=torch.Generator().manual_seed(2))
    scale_input = scales.float()[g_idx]  # [K, N]
    codes = (weight.t() / scale_input + zeros[g_idx]).round().clamp(0, 15)
    plain = (scale_input * (codes - zeros[g_idx])).t()
    stored = zeros - 1 if version == 1 else zeros
    state = {
        "qweight": gptq.pack(codes.to(torch.uint8), 0),
        "qzeros": gptq.pack(stored.to(torch.uint8), 1),
        "scales": scales,
        "g_idx": g_idx.int(),
    }
    return state, plain


def aqlm_state(weight: Tensor, books: int = 2, bits: int = 8) -> tuple[dict[str, Tensor], Tensor]:
    """Random codes and codebooks of the weight's shape and size; what counts is how they are
    read.
    """
    outputs, inputs = weight.shape
    generator = torch.Generator().manual_seed(inputs + outputs)
    codes = torch.randint(0, 2**bits, (outputs, inputs // 8, books), generator=generator)
    codebooks = torch.randn(books, 2**bits, 1, 8, generator=generator)
    scales = weight.std(1, keepdim=True) / books**0.5
    vectors = sum(codebooks[book][codes[..., book]] for book in range(books))  # [N, K / 8, 1, 8]
    stored = torch.int8 if bits == 8 else torch.int16
    signed = torch.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes).to(stored)
    state = {"codes": signed, "codebooks": codebooks, "scales": scales.half().view(-1, 1, 1, 1)}
    return state, vectors.flatten(1) * scales.half().float()


def hqq_state(
    weight: Tensor, bits: int = 4, as_float: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """Rounded between the ends of each group, and packed by the formula, row by row."""
    outputs, inputs = weight.shape
    groups = weight.reshape(-1, GROUP)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).half()
    zero = (-low / scale.float()).half()
    codes = (groups / scale.float() + zero.float()).round().clamp(0, 2**bits - 1).to(torch.uint8)
    plain = ((codes.float() - zero.float()) * scale.float()).view(outputs, inputs)
    rows = len(codes) * bits // 8
    packed = torch.zeros(rows, GROUP, dtype=torch.uint8)
    for place in range(8 // bits):
        packed |= codes[place * rows : (place + 1) * rows] << (8 - bits * (place + 1))
    state = {
        "W_q": packed.view(torch.float16) if as_float else packed,
        "scale": scale,
        "zero": zero,
        "axis": torch.tensor(1, dtype=torch.int32),
        "shape": torch.tensor([outputs, inputs]),
        "packing": torch.tensor(list(f"{bits}bit_u8".encode()), dtype=torch.uint8),
        "view_as_float": torch.tensor(int(as_float), dtype=torch.uint8),
        # and more that is not needed
        "compute_dtype": torch.tensor(list(b"torch.float16"), dtype=torch.uint8),
    }
    return state, plain


STATES = {"gptq": gptq_state, "aqlm": aqlm_state, "hqq": hqq_state}


def convert_folder(
    source: Path, target: Path, method: str, settings: dict | None = None, **options
) -> dict[str, Tensor]:
    """A copy of a plain model's folder in one of the formats; returns the plain weights that its
    layers stand for, by layer.
    """
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix == ".json" and file.name != "config.json":
            (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    own = (
        {"quant_method": method, "bits": 4, "group_size": GROUP}
        if method == "gptq"
        else {"quant_method": method}
    )
    (target / "config.json").write_text(
        json.dumps(config | {"quantization_config": own | (settings or {})})
    )
    tensors, plain = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if "_proj" not in name:
            tensors[name] = tensor
            continue
        state, plain[layer] = STATES[method](tensor, **options)
        tensors |= {f"{layer}.{part}": one for part, one in state.items()}
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return plain
