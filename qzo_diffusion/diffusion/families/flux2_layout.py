"""The single-file layout of FLUX.2, as Black Forest Labs publishes it.

`qkv` stacks diffusers' q, k and v. Single blocks keep theirs and the feed-forward in one tensor, as
diffusers does: rows are q, k, v, the feed-forward's gate and its values. The final modulation has
shift before scale, where diffusers has scale before shift. Nothing has a bias.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from qzo_diffusion.diffusion.original_layout import Pieces, TableLayout, count_blocks, norms_of
from qzo_diffusion.quant.entries import Entry

_TIME = "time_guidance_embed"
_OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": f"{_TIME}.timestep_embedder.linear_1",
    "time_in.out_layer": f"{_TIME}.timestep_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
}
_GUIDANCE = {
    "guidance_in.in_layer": f"{_TIME}.guidance_embedder.linear_1",
    "guidance_in.out_layer": f"{_TIME}.guidance_embedder.linear_2",
}
SIGN = "double_stream_modulation_img.lin."  # diffusers has linear


def layout_of(config: Mapping[str, Any]) -> dict[str, Pieces]:
    """Return original name (without prefix) -> its parts, for a transformer of that shape."""
    outside = _OUTSIDE | (_GUIDANCE if config["guidance_embeds"] else {})
    table = {f"{one}.weight": Pieces((f"{ours}.weight",)) for one, ours in outside.items()}
    swapped = Pieces(("norm_out.linear.weight",), swapped=True)
    table["final_layer.adaLN_modulation.1.weight"] = swapped
    for index in range(config["num_layers"]):
        table |= _double(f"double_blocks.{index}", f"transformer_blocks.{index}")
    for index in range(config["num_single_layers"]):
        table |= _single(f"single_blocks.{index}", f"single_transformer_blocks.{index}.attn")
    return table


def _double(original: str, ours: str) -> Iterator[tuple[str, Pieces]]:
    """Yield the tensors of a block with two streams."""
    queries = {"img": ("to_q", "to_k", "to_v"), "txt": ("add_q_proj", "add_k_proj", "add_v_proj")}
    out = {"img": "to_out.0", "txt": "to_add_out"}
    feed_forward = {"img": "ff", "txt": "ff_context"}
    added = {"img": "", "txt": "added_"}
    for side in ("img", "txt"):
        qkv = tuple(f"{ours}.attn.{part}.weight" for part in queries[side])
        yield f"{original}.{side}_attn.qkv.weight", Pieces(qkv)
        for theirs, mine in (
            ("attn.proj", f"attn.{out[side]}"),
            ("mlp.0", f"{feed_forward[side]}.linear_in"),
            ("mlp.2", f"{feed_forward[side]}.linear_out"),
        ):
            yield f"{original}.{side}_{theirs}.weight", Pieces((f"{ours}.{mine}.weight",))
        yield from norms_of(f"{original}.{side}_attn.norm", f"{ours}.attn.norm_{added[side]}")


def _single(original: str, ours: str) -> Iterator[tuple[str, Pieces]]:
    """Yield the tensors of a block with one stream."""
    yield f"{original}.linear1.weight", Pieces((f"{ours}.to_qkv_mlp_proj.weight",))
    yield f"{original}.linear2.weight", Pieces((f"{ours}.to_out.weight",))
    yield from norms_of(f"{original}.norm", f"{ours}.norm_")


def config_of(names: Mapping[str, Entry]) -> dict[str, Any]:
    """Infer diffusers' config. Raises KeyError for a missing tensor."""
    head = names["double_blocks.0.img_attn.norm.query_norm.scale"].shape[0]
    width, channels = names["img_in.weight"].shape
    return {
        "_class_name": "Flux2Transformer2DModel",
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": None,
        "num_layers": count_blocks(names, "double_blocks"),
        "num_single_layers": count_blocks(names, "single_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": names["txt_in.weight"].shape[1],
        "timestep_guidance_channels": names["time_in.in_layer.weight"].shape[1],
        "mlp_ratio": names["double_blocks.0.img_mlp.2.weight"].shape[1] / width,
        "guidance_embeds": "guidance_in.in_layer.weight" in names,
        # no tensor tells these; published models have four equal parts
        "axes_dims_rope": [head // 4] * 4,
        "rope_theta": 2000,
        "eps": 1e-6,
    }


FLUX2_LAYOUT = TableLayout("FLUX.2", SIGN, layout_of, config_of)
