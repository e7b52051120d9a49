"""The single-file layout of FLUX.1, as Black Forest Labs publishes it.

`qkv` stacks diffusers' q, k and v, and `linear1` of a single block the feed-forward below them. The
final modulation has shift before scale, where diffusers has scale before shift.
"""

from collections.abc import Mapping
from typing import Any

from qzo_diffusion.diffusion.original_layout import (
    Pieces,
    TableLayout,
    count_blocks,
    norms_of,
    with_bias,
)
from qzo_diffusion.quant.entries import Entry

FEED_FORWARD = 4  # its width over that of the hidden states
_OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_GUIDANCE = {
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
}


def layout_of(config: Mapping[str, Any]) -> dict[str, Pieces]:
    """Return original name (without prefix) -> its parts, for a transformer of that shape."""
    outside = _OUTSIDE | (_GUIDANCE if config["guidance_embeds"] else {})
    table = with_bias((original, Pieces((ours,))) for original, ours in outside.items())
    table |= with_bias(
        [("final_layer.adaLN_modulation.1", Pieces(("norm_out.linear",), swapped=True))]
    )
    for index in range(config["num_layers"]):
        table |= _double(f"double_blocks.{index}", f"transformer_blocks.{index}")
    width = config["num_attention_heads"] * config["attention_head_dim"]
    for index in range(config["num_single_layers"]):
        table |= _single(f"single_blocks.{index}", f"single_transformer_blocks.{index}", width)
    return table


def _double(original: str, ours: str) -> dict[str, Pieces]:
    image, text = f"{original}.img", f"{original}.txt"
    pairs = [
        (f"{image}_attn.qkv", Pieces(tuple(f"{ours}.attn.to_{part}" for part in "qkv"))),
        (f"{text}_attn.qkv", Pieces(tuple(f"{ours}.attn.add_{part}_proj" for part in "qkv"))),
        (f"{image}_attn.proj", Pieces((f"{ours}.attn.to_out.0",))),
        (f"{text}_attn.proj", Pieces((f"{ours}.attn.to_add_out",))),
        (f"{image}_mod.lin", Pieces((f"{ours}.norm1.linear",))),
        (f"{text}_mod.lin", Pieces((f"{ours}.norm1_context.linear",))),
    ]
    for side, feed_forward in ((image, "ff"), (text, "ff_context")):
        pairs += [
            (f"{side}_mlp.0", Pieces((f"{ours}.{feed_forward}.net.0.proj",))),
            (f"{side}_mlp.2", Pieces((f"{ours}.{feed_forward}.net.2",))),
        ]
    norms = [
        *norms_of(f"{image}_attn.norm", f"{ours}.attn.norm_"),
        *norms_of(f"{text}_attn.norm", f"{ours}.attn.norm_added_"),
    ]
    return with_bias(pairs) | dict(norms)


def _single(original: str, ours: str, width: int) -> dict[str, Pieces]:
    parts = (*(f"{ours}.attn.to_{part}" for part in "qkv"), f"{ours}.proj_mlp")
    rows = (width, width, width, FEED_FORWARD * width)
    pairs = [
        (f"{original}.linear1", Pieces(parts, rows=rows)),
        (f"{original}.linear2", Pieces((f"{ours}.proj_out",))),
        (f"{original}.modulation.lin", Pieces((f"{ours}.norm.linear",))),
    ]
    return with_bias(pairs) | dict(norms_of(f"{original}.norm", f"{ours}.attn.norm_"))


def config_of(names: Mapping[str, Entry]) -> dict[str, Any]:
    """Infer diffusers' config. Raises KeyError for a missing tensor."""
    head = names["double_blocks.0.img_attn.norm.query_norm.scale"].shape[0]
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": names["img_in.weight"].shape[1],
        "num_layers": count_blocks(names, "double_blocks"),
        "num_single_layers": count_blocks(names, "single_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": names["img_in.weight"].shape[0] // head,
        "joint_attention_dim": names["txt_in.weight"].shape[1],
        "pooled_projection_dim": names["vector_in.in_layer.weight"].shape[1],
        "guidance_embeds": "guidance_in.in_layer.weight" in names,
        # no tensor tells it; published models have (16, 56, 56) for heads of 128
        "axes_dims_rope": [head // 8, 7 * head // 16, 7 * head // 16],
    }


FLUX1_LAYOUT = TableLayout(
    "FLUX.1", "double_blocks.", layout_of, config_of, without="double_stream_modulation_img.lin."
)
