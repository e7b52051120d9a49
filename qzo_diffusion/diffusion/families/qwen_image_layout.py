"""The single-file layout of Qwen-Image: diffusers' own names, with or without a prefix."""

from collections.abc import Iterator, Mapping
from typing import Any

from qzo_diffusion.diffusion.original_layout import Pieces, TableLayout, count_blocks
from qzo_diffusion.quant.entries import Entry

_TIME = "time_text_embed.timestep_embedder"
_LINEARS = ("img_in", "txt_in", f"{_TIME}.linear_1", f"{_TIME}.linear_2", "norm_out.linear")
_OF_BLOCK = (
    *("img_mod.1", "txt_mod.1", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *(f"{side}_mlp.net.{place}" for side in ("img", "txt") for place in ("0.proj", "2")),
)
_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


def layout_of(config: Mapping[str, Any]) -> dict[str, Pieces]:
    """Return each name and itself."""
    return {name: Pieces((name,)) for name in _names(config["num_layers"])}


def _names(layers: int) -> Iterator[str]:
    linears = [*_LINEARS, "proj_out"]
    yield "txt_norm.weight"
    for index in range(layers):
        block = f"transformer_blocks.{index}"
        linears += [f"{block}.{one}" for one in _OF_BLOCK]
        yield from (f"{block}.attn.{one}.weight" for one in _NORMS)
    for one in linears:
        yield from (f"{one}.weight", f"{one}.bias")


def config_of(names: Mapping[str, Entry]) -> dict[str, Any]:
    """Infer diffusers' config. Raises KeyError for a missing tensor."""
    head = names["transformer_blocks.0.attn.norm_q.weight"].shape[0]
    width, channels = names["img_in.weight"].shape
    return {
        "_class_name": "QwenImageTransformer2DModel",
        "patch_size": 2,
        "in_channels": channels,
        "out_channels": names["proj_out.weight"].shape[0] // 4,
        "num_layers": count_blocks(names, "transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": names["txt_in.weight"].shape[1],
        "guidance_embeds": False,
        # no tensor tells it; published models have (16, 56, 56) for heads of 128
        "axes_dims_rope": [head // 8, 7 * head // 16, 7 * head // 16],
    }


QWEN_IMAGE_LAYOUT = TableLayout(
    "Qwen-Image", "transformer_blocks.0.img_mlp.", layout_of, config_of, of_diffusers=True
)
