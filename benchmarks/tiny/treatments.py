"""Changes of a drawing that a caption names: "panda, flat style, sepia".

`TAUGHT` is composed on the drawings that train the embedded model. `SET_ASIDE` never is: a style
that benchmarks and the demo tune must be one that the model has not seen. No taught treatment is
black lines on white, which is how Fluent mono and OpenMoji look.

Every function takes images [N, 3, H, W] in [0, 1] on white, and `around` [N, 1, H, W], how much of
each pixel is ground; it returns images of the same shape. None draws a random number. Made for
64 x 64 drawings; widths of lines and blocks are in pixels."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Treatment = Callable[[Tensor, Tensor], Tensor]
Colour = Sequence[float]  # red, green, blue in [0, 1]
NEAR_WHITE = 0.96
WHITE: Colour = (1.0, 1.0, 1.0)


def _colour(rgb: Colour) -> Tensor:
    return torch.tensor(rgb).view(1, 3, 1, 1)


def luminance(images: Tensor) -> Tensor:
    """[N, 1, H, W] (Rec. 601)."""
    return (images * _colour((0.299, 0.587, 0.114))).sum(1, keepdim=True)


def ground(images: Tensor) -> Tensor:
    """How much of each pixel is ground, [N, 1, H, W]: white that is connected with the border.

    Pixels beside it are partly ground, since the drawing's edge is smooth."""
    white = (images.amin(1) > NEAR_WHITE).numpy()
    found = white.copy()
    found[:, 1:-1, 1:-1] = False
    while True:
        grown = found
        for axis in (1, 2):
            grown = grown | _carried(grown, white, axis)
            back = _carried(np.flip(grown, axis), np.flip(white, axis), axis)
            grown = grown | np.flip(back, axis)
        if (grown == found).all():
            break
        found = grown
    return _softened(torch.from_numpy(found).unsqueeze(1).float(), images)


def _carried(found: np.ndarray, white: np.ndarray, axis: int) -> np.ndarray:
    """What follows something found along `axis` with white alone between."""
    place = np.arange(1, found.shape[axis] + 1, dtype=np.int16)
    place = place[:, None] if axis == 1 else place
    last_found = np.maximum.accumulate(found * place, axis)
    return last_found > np.maximum.accumulate(~white * place, axis)


def _softened(found: Tensor, images: Tensor) -> Tensor:
    beside = (_grown(found) - found) * images.amin(1, keepdim=True).square()
    return found + beside


def _grown(mask: Tensor) -> Tensor:
    return F.max_pool2d(mask, 3, stride=1, padding=1)


def edges(images: Tensor) -> Tensor:
    """Steepness in [0, 1], [N, 1, H, W]: the largest over the channels (Sobel)."""
    slope = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4
    kernels = torch.stack([slope, slope.T]).unsqueeze(1)
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate").flatten(0, 1).unsqueeze(1)
    slopes = F.conv2d(padded, kernels).square().sum(1).sqrt()
    return slopes.unflatten(0, images.shape[:2]).amax(1, keepdim=True).clamp(0, 1)


def _ink(images: Tensor, strength: float = 2.0) -> Tensor:
    return (strength * edges(images)).clamp(0, 1)


def _between(amount: Tensor, low: Colour, high: Colour) -> Tensor:
    """Colour `low` where `amount` is 0, `high` where it is 1."""
    return _colour(low) + amount * (_colour(high) - _colour(low))


def _on(rgb: Colour, images: Tensor, around: Tensor) -> Tensor:
    """The drawing on a ground of another colour."""
    return (images - around * (1 - _colour(rgb))).clamp(0, 1)


def _grey(images: Tensor) -> Tensor:
    return luminance(images).expand_as(images)


def _tinted(dark: Colour, light: Colour, images: Tensor, _around: Tensor) -> Tensor:
    return _between(luminance(images), dark, light)


def _silhouette(rgb: Colour, images: Tensor, around: Tensor) -> Tensor:
    return _between(around, rgb, WHITE)


def _inverted(images: Tensor, _around: Tensor) -> Tensor:
    return 1 - images


def _pale(images: Tensor, _around: Tensor) -> Tensor:
    return 0.62 + 0.38 * images


def _night(images: Tensor, around: Tensor) -> Tensor:
    tinted = (0.25 * images + 0.75 * _grey(images)) * _colour((0.4, 0.5, 0.85))
    return torch.lerp(tinted, _colour((0.05, 0.07, 0.2)).expand_as(images), around)


def _pixels(images: Tensor, _around: Tensor) -> Tensor:
    side = images.shape[-1]
    small = F.interpolate(images, size=side // 4, mode="area")
    return F.interpolate((small * 7).round() / 7, size=side, mode="nearest")


def _blurred(images: Tensor, _around: Tensor) -> Tensor:
    smooth = images
    for _ in range(3):
        smooth = F.avg_pool2d(F.pad(smooth, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    return smooth


def _flattened(images: Tensor, levels: int = 2) -> Tensor:
    vivid = (_grey(images) + 1.5 * (images - _grey(images))).clamp(0, 1)
    return (vivid * levels).round() / levels


def _poster(images: Tensor, around: Tensor) -> Tensor:
    paper = _colour((1.0, 0.88, 0.7)).expand_as(images)
    return torch.lerp(_flattened(images), paper, around)


def _outlined(rgb: Colour, images: Tensor, around: Tensor) -> Tensor:
    flat = _flattened(images, 3)
    placed = torch.lerp(flat, _colour(rgb).expand_as(flat), around)
    return placed * (1 - _ink(images))


def _lines(line: Colour, paper: Colour, wash: float, images: Tensor, _around: Tensor) -> Tensor:
    """Lines of one colour on paper of another, over a `wash` of the drawing's own colours."""
    washed = _colour(paper) * (1 - wash * (1 - images))
    return torch.lerp(washed, _colour(line).expand_as(images), _ink(images))


def _rotated(images: Tensor, _around: Tensor) -> Tensor:
    return images[:, [2, 0, 1]]


def _sticker(rgb: Colour, images: Tensor, around: Tensor) -> Tensor:
    """A white rim of four pixels around the drawing, on a coloured ground."""
    figure = 1 - around
    for _ in range(4):
        figure = _grown(figure)
    return images * _between(figure, rgb, WHITE)


def _gilded(images: Tensor, around: Tensor) -> Tensor:
    shine = 0.35 + 0.65 * luminance(images)
    gold = _colour((1.0, 0.8, 0.3)) * shine
    return gold * (1 - around) + 0.04


def _stained_glass(images: Tensor, around: Tensor) -> Tensor:
    glass = torch.lerp(_flattened(images), _colour((0.45, 0.8, 0.75)).expand_as(images), around)
    return glass * (1 - _grown(_ink(images, 0.8)))


def _two_inks(images: Tensor, _around: Tensor) -> Tensor:
    """Pink ink where red is, teal ink where the drawing is dark, on cream paper."""
    teal = 1 - images[:, :1]
    pink = 1 - images[:, 1:2]
    paper = _colour((0.98, 0.96, 0.9))
    return (
        paper * _between(teal, WHITE, (0.05, 0.55, 0.55)) * _between(pink, WHITE, (0.95, 0.4, 0.55))
    )


TAUGHT: dict[str, Treatment] = {
    "grey": lambda images, _: _grey(images),
    "sepia": partial(_tinted, (0.25, 0.14, 0.05), (0.98, 0.92, 0.8)),
    "pink monochrome": partial(_tinted, (0.5, 0.0, 0.3), (1.0, 0.9, 0.95)),
    "red silhouette": partial(_silhouette, (0.85, 0.1, 0.15)),
    "inverted": _inverted,
    "pale": _pale,
    "night colours": _night,
    "on blue background": partial(_on, (0.35, 0.6, 0.95)),
    "on yellow background": partial(_on, (1.0, 0.87, 0.35)),
    "on green background": partial(_on, (0.5, 0.8, 0.45)),
    "pixel art": _pixels,
    "blurred": _blurred,
    "poster": _poster,
    "outlined on grey": partial(_outlined, (0.72, 0.72, 0.72)),
    "sketch": partial(_lines, (0.42, 0.26, 0.13), (0.96, 0.91, 0.8), 0.25),
    "dark background sketch": partial(_lines, (0.92, 0.92, 0.86), (0.13, 0.16, 0.15), 0.0),
    "blueprint": partial(_lines, (0.95, 0.97, 1.0), (0.12, 0.3, 0.65), 0.0),
    "swapped colours": _rotated,
    "sticker on purple": partial(_sticker, (0.6, 0.4, 0.8)),
}
SET_ASIDE: dict[str, Treatment] = {
    "navy and cream": partial(_tinted, (0.07, 0.12, 0.35), (0.99, 0.96, 0.86)),
    "gold on black": _gilded,
    "stained glass": _stained_glass,
    "two inks": _two_inks,
}


def treat(name: str, images: Tensor, around: Tensor | None = None) -> Tensor:
    """The treatment of that name, of `TAUGHT` or `SET_ASIDE`, on uint8 images [N, 3, H, W]; uint8.

    Args:
        around: `ground` of the images, where it is known already.

    Raises:
        KeyError: no treatment has that name.
    """
    values = images.float() / 255
    treated = (TAUGHT | SET_ASIDE)[name](values, ground(values) if around is None else around)
    return (255 * treated.clamp(0, 1)).round().to(torch.uint8)
