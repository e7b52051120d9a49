"""Latents in squares of 2x2 as one token each, as several families of transformers take them."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from qzo_diffusion.diffusion.families.family import Config, Shape

SIDE = 2  # latents along a side of a token


def shape_of_squares(config: Config) -> Shape:
    """Return the shape of a transformer that takes such tokens."""
    return Shape(
        width=config["num_attention_heads"] * config["attention_head_dim"],
        latents=SIDE,
        text_width=config["joint_attention_dim"],
        channels=config["in_channels"] // SIDE**2,
    )


def packed(latents: Tensor) -> Tensor:
    """Return latents [B, C, h, w] as tokens [B, h · w / 4, 4 · C], row by row."""
    return F.pixel_unshuffle(latents, SIDE).flatten(2).transpose(1, 2)


def unpacked(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Return tokens [B, rows · columns, 4 · C] as latents [B, C, 2 · rows, 2 · columns]."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (rows, columns)), SIDE)


def rows_and_columns(latents: Tensor) -> tuple[int, int]:
    """Return the number of tokens along each side of latents [B, C, h, w]."""
    return latents.shape[-2] // SIDE, latents.shape[-1] // SIDE


def drawn(pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
    """Return the tokens that a pipeline drew as latents; height and width are in pixels."""
    side = SIDE * pipeline.vae_scale_factor
    return unpacked(latents, height // side, width // side)
