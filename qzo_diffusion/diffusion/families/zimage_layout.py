"""The single-file layout of Z-Image, which ComfyUI reads: `qkv` stacks diffusers' q, k and v."""

from collections.abc import Iterator, Mapping
from typing import Any

from qzo_diffusion.diffusion.original_layout import Pieces, TableLayout, count_blocks, with_bias
from qzo_diffusion.quant.entries import Entry

_PATCH = "2-1"  # pixels along a side of a token, and frames
_OUTSIDE = {
    "x_embedder": f"all_x_embedder.{_PATCH}",
    "final_layer.linear": f"all_final_layer.{_PATCH}.linear",
    "final_layer.adaLN_modulation.1": f"all_final_layer.{_PATCH}.adaLN_modulation.1",
    "cap_embedder.1": "cap_embedder.1",
    "t_embedder.mlp.0": "t_embedder.mlp.0",
    "t_embedder.mlp.2": "t_embedder.mlp.2",
}
_PADS = ("x_pad_token", "cap_pad_token")
_WITHOUT_TIME = "context_refiner"
_SAME = (
    *(f"feed_forward.w{index}" for index in (1, 2, 3)),
    *("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"),
)
_ATTENTION = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.out": ("attention.to_out.0",),
    "attention.q_norm": ("attention.norm_q",),
    "attention.k_norm": ("attention.norm_k",),
} | {name: (name,) for name in _SAME}


def layout_of(config: Mapping[str, Any]) -> dict[str, Pieces]:
    """Return original name (without prefix) -> its parts, for a transformer of that shape."""
    table = with_bias((original, Pieces((ours,))) for original, ours in _OUTSIDE.items())
    table |= {name: Pieces((name,)) for name in ("cap_embedder.0.weight", *_PADS)}
    for block in _blocks(config):
        table |= _block(block)
    return table


def _blocks(config: Mapping[str, Any]) -> Iterator[str]:
    counts = {
        "noise_refiner": config["n_refiner_layers"],
        _WITHOUT_TIME: config["n_refiner_layers"],
        "layers": config["n_layers"],
    }
    return (f"{name}.{index}" for name, count in counts.items() for index in range(count))


def _block(name: str) -> dict[str, Pieces]:
    table = {
        f"{name}.{original}.weight": Pieces(tuple(f"{name}.{part}.weight" for part in parts))
        for original, parts in _ATTENTION.items()
    }
    time = f"{name}.adaLN_modulation.0"
    return table if name.startswith(_WITHOUT_TIME) else table | with_bias([(time, Pieces((time,)))])


def config_of(names: Mapping[str, Entry]) -> dict[str, Any]:
    """Infer diffusers' config. Raises KeyError for a missing tensor."""
    width, of_patch = names["x_embedder.weight"].shape
    head = names["layers.0.attention.q_norm.weight"].shape[0]
    if not set(_PADS) <= names.keys():
        raise KeyError(_PADS[0])  # Lumina 2 has none
    return {
        "_class_name": "ZImageTransformer2DModel",
        "all_patch_size": [2],
        "all_f_patch_size": [1],
        "in_channels": of_patch // 4,
        "dim": width,
        "n_layers": count_blocks(names, "layers"),
        "n_refiner_layers": count_blocks(names, "noise_refiner"),
        "n_heads": width // head,
        "n_kv_heads": width // head,
        "cap_feat_dim": names["cap_embedder.1.weight"].shape[1],
        # no tensor tells them; published models have (32, 48, 48) for heads of 128
        "axes_dims": [head // 4, 3 * head // 8, 3 * head // 8],
        "axes_lens": [1536, 512, 512],
    }


ZIMAGE_LAYOUT = TableLayout(
    "Z-Image", "noise_refiner.0.attention.qkv.", layout_of, config_of, flattened=_PADS
)
