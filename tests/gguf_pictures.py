"""Small random transformers of pictures in GGUF files, as ComfyUI's tools lay them out."""

from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from qzo_diffusion.diffusion.families import registry
from qzo_diffusion.diffusion.original_layout import PREFIX
from qzo_diffusion.quant.gguf import FACTORS
from qzo_diffusion.quant.weights import Pending

MADE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # by the package; of other types bytes are drawn


def random_blocks(shape: tuple[int, int], kind: str, generator: np.random.Generator) -> np.ndarray:
    """Any bytes are codes; the factors are of a size that gives weights of a few hundredths."""
    size, count = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    data = generator.integers(0, 256, (shape[0], shape[1] // size, count), dtype=np.uint8)
    for place in FACTORS[kind]:
        factors = generator.uniform(1e-4, 2e-4, (*data.shape[:2], 1)).astype("<f2")
        data[..., place : place + 2] = factors.view(np.uint8)
    return data.reshape(shape[0], -1)


def write_gguf(
    file: Path, model, kind: str = "Q4_0", prefix: str = "", positions: tuple[int, ...] = ()
) -> Path:
    """The transformer in blocks of `kind`; layers whose rows are no whole blocks are in fp16.

    Args:
        positions: another shape of `pos_embed`.
    """
    pending = {name: Pending.of(tensor) for name, tensor in model.state_dict().items()}
    generator = np.random.default_rng(0)
    family = registry.family_of({"_class_name": type(model).__name__, **model.config})
    writer = gguf.GGUFWriter(file, family.gguf[0])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    size, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    for name, one in family.denoiser.layout.to_original(pending, model.config).items():
        bare, tensor = name.removeprefix(PREFIX), one.make().float()
        if positions and bare == "pos_embed":
            tensor = tensor.reshape(positions)
        kept = bare.startswith(family.gguf_kept)
        data, of_kind = stored(tensor, "F16" if kept else kind, size, generator)
        writer.add_tensor(prefix + bare, data, raw_dtype=of_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def stored(tensor: Tensor, kind: str, size: int, generator: np.random.Generator):
    kinds = gguf.GGMLQuantizationType
    if tensor.dim() == 1 or tensor.numel() <= 1024:
        return tensor.numpy(), kinds.F32
    if kind == "F16" or tensor.dim() != 2 or tensor.shape[1] % size:
        return tensor.half().numpy(), kinds.F16
    if kind in MADE:
        return gguf.quants.quantize(tensor.numpy(), kinds[kind]), kinds[kind]
    return random_blocks(tuple(tensor.shape), kind, generator), kinds[kind]


def plain_weights(file: Path) -> dict[str, Tensor]:
    """What the file's tensors stand for, as the package gguf reads them, by their names."""
    return {
        tensor.name: torch.from_numpy(
            gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()
        ).view(*map(int, reversed(tensor.shape)))
        for tensor in gguf.GGUFReader(file).tensors
    }


def seen_by_comfyui(file: Path) -> dict[str, int]:
    """The shape of Stable Diffusion 3 that ComfyUI finds in a file.

    Its node reads `general.architecture`, a text among the names that it knows, and the shapes of
    tensors, outermost first, with or without the prefix; no name is longer than 127 characters. A
    name of diffusers would make the file invalid. ComfyUI then looks at these tensors.
    """
    reader = gguf.GGUFReader(file)
    field = reader.get_field("general.architecture")
    assert field.types == [gguf.GGUFValueType.STRING]
    assert field.contents() == "sd3"
    shapes = {
        tensor.name.removeprefix(PREFIX): tuple(map(int, reversed(tensor.shape)))
        for tensor in reader.tensors
    }
    assert max(map(len, shapes)) <= 127
    assert "transformer_blocks.0.attn.add_q_proj.weight" not in shapes
    assert "joint_blocks.0.x_block.attn.qkv.weight" in shapes
    assert "joint_blocks.0.context_block.attn.qkv.weight" in shapes
    patches, patch = shapes["x_embedder.proj.weight"], shapes["x_embedder.proj.weight"][2]
    return {
        "in_channels": patches[1],
        "patch_size": patch,
        "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
        "num_attention_heads": patches[0] // 64,
        "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "caption_projection_dim": shapes["context_embedder.weight"][0],
        "pos_embed_max_size": round(shapes["pos_embed"][1] ** 0.5),
    }
