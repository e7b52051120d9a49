"""Drawings changed at random, so that the scorer learns what is shown and not how these five styles
happen to draw it.

Batched on tensors; every random number comes from the generator that is handed in.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

GREY = torch.tensor([0.299, 0.587, 0.114])


def augment(images: Tensor, others: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images [N, 3, H, W] in [0, 1], `others` the same concepts in another style.

    Returns:
        the changed images, and bool [N]: whether the style is still the one of the file.
    """
    images, mixed = _mixed(images, others, generator)
    images = _moved(images, generator)
    images, recoloured = _recoloured(images, generator)
    images, drawn = _redrawn(images, generator)
    return _blurred(images, generator).clamp(0, 1), ~(mixed | recoloured | drawn)


def _chosen(count: int, share: float, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator) < share


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return (low + (high - low) * torch.rand(count, generator=generator)).view(-1, 1, 1, 1)


def _mixed(images: Tensor, others: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One in five is blended with the same concept in another style: a style that nobody drew."""
    count = len(images)
    chosen = _chosen(count, 0.2, generator)
    weight = _uniform(count, 0.25, 0.75, generator)
    return torch.where(chosen.view(-1, 1, 1, 1), torch.lerp(images, others, weight), images), chosen


def _moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turned by up to 12 degrees, scaled, stretched and shifted, on white. No mirror images: some
    drawings are arrows.
    """
    count = len(images)
    angle, scale, stretch, dx, dy = (
        _uniform(count, low, high, generator).flatten()
        for low, high in ((-0.21, 0.21), (0.85, 1.3), (0.9, 1.1), (-0.12, 0.12), (-0.12, 0.12))
    )
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    matrix = torch.stack(
        [torch.stack([cos * stretch, -sin, dx], 1), torch.stack([sin, cos / stretch, dy], 1)], 1
    )
    places = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return 1 - F.grid_sample(1 - images, places, align_corners=False)


def _recoloured(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A third get other colours by a random mixture of channels, a quarter become grey, a tenth get
    a coloured ground.
    """
    count = len(images)
    kind = torch.rand(count, generator=generator)
    other, grey = kind < 0.35, kind > 0.75
    mixture = torch.eye(3) + 0.45 * torch.randn(count, 3, 3, generator=generator)
    mixture = mixture / mixture.sum(2, keepdim=True).clamp(min=0.3)  # white stays white
    mixture = torch.where(
        grey.view(-1, 1, 1),
        GREY.expand(count, 3, 3),
        torch.where(other.view(-1, 1, 1), mixture, torch.eye(3)),
    )
    images = torch.einsum("nij,njhw->nihw", mixture, images).clamp(0, 1)
    gamma = torch.where(
        _chosen(count, 0.4, generator).view(-1, 1, 1, 1),
        _uniform(count, 0.5, 1.8, generator),
        torch.ones(1),
    )
    images = images.clamp(min=1e-4) ** gamma
    ground = 1 - 0.5 * torch.rand(count, 3, 1, 1, generator=generator)
    tinted = _chosen(count, 0.1, generator)
    return torch.where(tinted.view(-1, 1, 1, 1), images * ground, images), other | grey | tinted


def _redrawn(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One in five becomes a line drawing, one in five gets dark outlines over flattened colours."""
    count = len(images)
    kind = torch.rand(count, generator=generator)
    lines, outlined = kind < 0.2, kind > 0.8
    ink = 1 - (_edges(images) * _uniform(count, 1.5, 4.0, generator)).clamp(0, 1)
    flat = (images * 3).round() / 3
    drawn = torch.where(lines.view(-1, 1, 1, 1), ink.expand_as(images), images)
    return torch.where(outlined.view(-1, 1, 1, 1), flat * ink, drawn), lines | outlined


def _edges(images: Tensor) -> Tensor:
    """Size of the steepest slope over the channels, [N, 1, H, W] (Sobel)."""
    slope = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4
    kernels = torch.stack([slope, slope.T]).unsqueeze(1)
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    count, channels, height, width = images.shape
    slopes = F.conv2d(padded.reshape(count * channels, 1, height + 2, width + 2), kernels)
    return slopes.square().sum(1).sqrt().view(count, channels, height, width).amax(1, keepdim=True)


def _blurred(images: Tensor, generator: torch.Generator) -> Tensor:
    """A quarter are drawn again from half the pixels, a quarter get noise: what a small autoencoder
    leaves.
    """
    count, side = len(images), images.shape[-1]
    small = F.interpolate(images, scale_factor=0.5, mode="area")
    soft = F.interpolate(small, size=(side, side), mode="bilinear", align_corners=False)
    images = torch.where(_chosen(count, 0.25, generator).view(-1, 1, 1, 1), soft, images)
    noise = torch.randn(images.shape, generator=generator) * _uniform(count, 0.02, 0.12, generator)
    return torch.where(_chosen(count, 0.25, generator).view(-1, 1, 1, 1), images + noise, images)
