"""Convert between diffusers' layout and the single-file layout of Stability AI's SD3 and SD3.5,
which ComfyUI and sd-scripts read.

Both hold the same numbers. They differ in two ways. `attn.qkv` stacks diffusers' q, k and v. The
final modulation has shift before scale, where diffusers has scale before shift; it is
`final_layer.adaLN_modulation`, and the text side of the last block, which has no feed-forward. One
table serves both directions.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.quant.describe import described_tensors
from qzo_diffusion.quant.entries import Entry, joined
from qzo_diffusion.quant.weights import Pending

PREFIX = "model.diffusion_model."
_BLOCK = "joint_blocks.0.x_block.attn."


@dataclass(frozen=True)
class Pieces:
    """Diffusers' names of the parts of one original tensor, top to bottom. `swapped`: its halves
    lie in the other order.
    """

    names: tuple[str, ...]
    swapped: bool = False


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
    table |= _with_bias((original, Pieces((ours,))) for original, ours in outside.items())
    table |= _with_bias(
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
    table = _with_bias(pairs)
    for original, mine in norms if qk_norm else ():
        table |= {
            f"{original}.ln_{part}.weight": Pieces((f"{mine}{part}.weight",)) for part in "qk"
        }
    return table


def _with_bias(pairs: Iterable[tuple[str, Pieces]]) -> dict[str, Pieces]:
    return {
        f"{original}.{kind}": Pieces(
            tuple(f"{name}.{kind}" for name in pieces.names), pieces.swapped
        )
        for original, pieces in pairs
        for kind in ("weight", "bias")
    }


def is_original(names: Iterable[str]) -> bool:
    return any(name.removeprefix(PREFIX).startswith("joint_blocks.") for name in names)


def whole_shapes(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return the entries with the first dimension of `pos_embed`, which is 1: llama.cpp drops it
    where it writes a file.
    """
    return {
        name: replace(one, shape=(1, *one.shape))
        if name.removeprefix(PREFIX) == "pos_embed" and len(one.shape) == 2
        else one
        for name, one in entries.items()
    }


def config_of(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Infer the config of diffusers' SD3Transformer2DModel from the shapes of a checkpoint in the
    original layout.

    Raises:
        ModelError: it is not an SD3 transformer.
    """
    names = _without_prefix(entries)
    try:
        width = names["x_embedder.proj.weight"].shape[0]
        patch = names["x_embedder.proj.weight"].shape[2]
        head = names[_BLOCK + "ln_q.weight"].shape[0] if _BLOCK + "ln_q.weight" in names else 64
        blocks = {
            int(found[1]) for name in names if (found := re.match(r"joint_blocks\.(\d+)\.", name))
        }
        return {
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
                block
                for block in blocks
                if f"joint_blocks.{block}.x_block.attn2.qkv.weight" in names
            ),
            "qk_norm": "rms_norm" if _BLOCK + "ln_q.weight" in names else None,
        }
    except (KeyError, IndexError, ZeroDivisionError) as error:
        kind = described_tensors(entries)
        raise ModelError(
            f"a single file that is {kind.name}"
            if kind
            else f"a single file that is not a Stable Diffusion 3 transformer: it lacks {error}",
            "a checkpoint in the layout of Stability AI, such as sd3.5_large.safetensors",
            kind.remedy if kind else "give that file, or a diffusers folder",
        ) from None


def to_diffusers(entries: Mapping[str, Entry], config: Mapping[str, Any]) -> dict[str, Entry]:
    """Return the same bytes of the file under diffusers' names.

    Other parts of the file (VAE, encoders) are left out. Tensors of the transformer that the layout
    lacks keep their place beside a layer, so that a foreign scale is noticed.

    Raises:
        ModelError: a tensor is missing.
    """
    names, found = _without_prefix(entries), dict[str, Entry]()
    table = layout_of(config)
    for original, pieces in table.items():
        if original not in names:
            raise ModelError(
                f"a single file without {original}",
                "all tensors of the transformer",
                "download it again",
            )
        found |= _parts(original, names[original], pieces)
    left = {_place_of(name, table): names[name] for name in names if name not in table}
    return found | left


def _parts(original: str, entry: Entry, pieces: Pieces) -> dict[str, Entry]:
    """Split one original tensor into diffusers' tensors."""
    count = len(pieces.names)
    if count == 1 and not pieces.swapped:
        return {pieces.names[0]: entry}
    sections = 2 if pieces.swapped else count
    if not entry.shape or entry.shape[0] == 0 or entry.shape[0] % sections:
        raise ModelError(
            f"{original} of the shape {entry.shape}",
            f"rows that {sections} tensors share",
            "give a file of Stable Diffusion 3 or 3.5",
        )
    rows = entry.shape[0] // sections
    parts = [entry.rows(rows * part, rows * (part + 1)) for part in range(sections)]
    whole = [joined(parts[::-1])] if pieces.swapped else parts
    return dict(zip(pieces.names, whole, strict=True))


def _place_of(name: str, table: Mapping[str, Pieces]) -> str:
    """Return the name that a tensor beside a layer has beside diffusers' layer."""
    layer, _, part = name.rpartition(".")
    pieces = table.get(f"{layer}.weight")
    return name if pieces is None else f"{pieces.names[0].rpartition('.')[0]}.{part}"


def to_original(tensors: Mapping[str, Pending], config: Mapping[str, Any]) -> dict[str, Pending]:
    """Return diffusers' tensors under the original names, with the prefix."""
    return {
        PREFIX + original: _put_together([tensors[name] for name in pieces.names], pieces.swapped)
        for original, pieces in layout_of(config).items()
    }


def layout_of(config: Mapping[str, Any]) -> dict[str, Pieces]:
    return layout(
        config["num_layers"], config.get("dual_attention_layers") or (), bool(config.get("qk_norm"))
    )


def _put_together(parts: list[Pending], swapped: bool) -> Pending:
    def make() -> Tensor:
        whole = torch.cat([part.make() for part in parts])
        return torch.cat(whole.chunk(2)[::-1]) if swapped else whole

    if len(parts) == 1 and not swapped:
        return parts[0]
    return Pending(
        parts[0].dtype, (sum(part.shape[0] for part in parts), *parts[0].shape[1:]), make
    )


def _without_prefix(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    chosen = _chosen(entries)
    return {name.removeprefix(PREFIX): entry for name, entry in chosen}


def _chosen(entries: Mapping[str, Entry]) -> Iterator[tuple[str, Entry]]:
    """Yield the transformer's tensors; a file without the prefix is the transformer alone."""
    prefixed = any(name.startswith(PREFIX) for name in entries)
    return (
        (name, entry) for name, entry in entries.items() if not prefixed or name.startswith(PREFIX)
    )
