"""The single-file layout of Stable Diffusion 3 and 3.5, as Stability AI publishes it.

`attn.qkv` stacks diffusers' q, k and v. The final modulation has shift before scale, where
diffusers has scale before shift; it is `final_layer.adaLN_modulation`, and the text side of the
last block, which has no feed-forward.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from qzo_diffusion.diffusion.original_layout import Pieces, TableLayout, with_bias
from qzo_diffusion.quant.entries import Entry

_BLOCK = "joint_blocks.0.x_block.attn."


def layout(
    num_layers: int, dual_attention_layers: Iterable[int], qk_norm: bool
) -> dict[str, Pieces]:
    """Return original name (without prefix) -> its parts, for a transformer of that shape."""
    table = {"pos_embed": Pieces(("pos_embed.pos_embed",))}
    outside = {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "context_embedder": "context_embedder",
        "final_layer.linear": "proj_out",
    }
    table |= with_bias((original, Pieces((ours,))) for original, ours in outside.items())
    table |= with_bias(
        [("final_layer.adaLN_modulation.1", Pieces(("norm_out.linear",), swapped=True))]
    )
    dual = set(dual_attention_layers)
    for index in range(num_layers):
        table |= _block(index, last=index == num_layers - 1, dual=index in dual, qk_norm=qk_norm)
    return table


def _block(index: int, *, last: bool, dual: bool, qk_norm: bool) -> dict[str, Pieces]:
    image, text, ours = (
        f"joint_blocks.{index}.x_block",
        f"joint_blocks.{index}.context_block",
        f"transformer_blocks.{index}",
    )
    pairs = [
        (f"{image}.attn.qkv", Pieces(tuple(f"{ours}.attn.to_{part}" for part in "qkv"))),
        (f"{text}.attn.qkv", Pieces(tuple(f"{ours}.attn.add_{part}_proj" for part in "qkv"))),
        (f"{image}.attn.proj", Pieces((f"{ours}.attn.to_out.0",))),
        (f"{image}.adaLN_modulation.1", Pieces((f"{ours}.norm1.linear",))),
        (f"{text}.adaLN_modulation.1", Pieces((f"{ours}.norm1_context.linear",), swapped=last)),
        (f"{image}.mlp.fc1", Pieces((f"{ours}.ff.net.0.proj",))),
        (f"{image}.mlp.fc2", Pieces((f"{ours}.ff.net.2",))),
    ]
    if not last:
        pairs += [
            (f"{text}.attn.proj", Pieces((f"{ours}.attn.to_add_out",))),
            (f"{text}.mlp.fc1", Pieces((f"{ours}.ff_context.net.0.proj",))),
            (f"{text}.mlp.fc2", Pieces((f"{ours}.ff_context.net.2",))),
        ]
    norms = [(f"{image}.attn", f"{ours}.attn.norm_"), (f"{text}.attn", f"{ours}.attn.norm_added_")]
    if dual:
        pairs += [
            (f"{image}.attn2.qkv", Pieces(tuple(f"{ours}.attn2.to_{part}" for part in "qkv"))),
            (f"{image}.attn2.proj", Pieces((f"{ours}.attn2.to_out.0",))),
        ]
        norms.append((f"{image}.attn2", f"{ours}.attn2.norm_"))
    table = with_bias(pairs)
    for original, mine in norms if qk_norm else ():
        table |= {
            f"{original}.ln_{part}.weight": Pieces((f"{mine}{part}.weight",)) for part in "qk"
        }
    return table


def config_of(names: Mapping[str, Entry]) -> dict[str, Any]:
    """Infer diffusers' config. Raises KeyError for a missing tensor."""
    width = names["x_embedder.proj.weight"].shape[0]
    patch = names["x_embedder.proj.weight"].shape[2]
    head = names[_BLOCK + "ln_q.weight"].shape[0] if _BLOCK + "ln_q.weight" in names else 64
    blocks = {
        int(found[1]) for name in names if (found := re.match(r"joint_blocks\.(\d+)\.", name))
    }
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 128,
        "patch_size": patch,
        "in_channels": names["x_embedder.proj.weight"].shape[1],
        "out_channels": names["final_layer.linear.weight"].shape[0] // patch**2,
        "num_layers": len(blocks),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": names["context_embedder.weight"].shape[1],
        "caption_projection_dim": names["context_embedder.weight"].shape[0],
        "pooled_projection_dim": names["y_embedder.mlp.0.weight"].shape[1],
        "pos_embed_max_size": math.isqrt(names["pos_embed"].shape[1]),
        "dual_attention_layers": sorted(
            block for block in blocks if f"joint_blocks.{block}.x_block.attn2.qkv.weight" in names
        ),
        "qk_norm": "rms_norm" if _BLOCK + "ln_q.weight" in names else None,
    }


def layout_of(config: Mapping[str, Any]) -> dict[str, Pieces]:
    return layout(
        config["num_layers"], config.get("dual_attention_layers") or (), bool(config.get("qk_norm"))
    )


SD3_LAYOUT = TableLayout(
    "Stable Diffusion 3 and 3.5", "joint_blocks.", layout_of, config_of, flattened=("pos_embed",)
)
