"""Measure whether the style was learned, in a scorer's image features of unit length.

similarity  mean cos(picture, centroid of the style's images)
KID         unbiased MMD² with the kernel (x·y / D + 1)³, features scaled to length √D
            (Bińkowski et al. 2018, arXiv 1801.01401)
CMMD        1000 · MMD² with the kernel exp(-|x - y|² / 2·10²), with the diagonal
            (Jayasumana et al. 2024, arXiv 2401.09603)
control     similarity of the style's held-out images minus that of images of other styles: the
            largest difference that similarity can show here. Without held-out images each
            training image is compared with the others
nearest     cos to the closest training image, beside the same for held-out images and for the
            base's pictures: a picture above all of those is a copy
diversity   1 - mean cos between different pictures of a set: near zero when all look alike
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from qzo_diffusion.evaluate import intervals

Values = NDArray[np.float64]
CMMD_WIDTH = 10.0


def similarity(pictures: Tensor, style: Tensor) -> list[float]:
    """Return the cosine of each picture with the centroid of the style's images.

    Features are [N, D] and [M, D] of unit length.
    """
    centroid = F.normalize(style.double().mean(0), dim=0)
    found: list[float] = (pictures.double() @ centroid).tolist()
    return found


def polynomial_kernel(a: Tensor, b: Tensor) -> Values:
    """Return KID's kernel of unit features.

    KID takes features of length √D, whose dot product over D is a cosine.
    """
    kernel: Values = ((a.double() @ b.double().T + 1) ** 3).numpy()
    return kernel


def gaussian_kernel(a: Tensor, b: Tensor) -> Values:
    """Return CMMD's kernel of unit features."""
    kernel: Values = torch.exp(
        -(torch.cdist(a.double(), b.double()) ** 2) / (2 * CMMD_WIDTH**2)
    ).numpy()
    return kernel


def kid(pictures: Tensor, style: Tensor) -> float | None:
    """Return KID, None for fewer than two pictures on a side. It is unbiased, so it can be below
    zero.
    """
    if min(len(pictures), len(style)) < 2:
        return None
    ones = np.ones((1, len(pictures))), np.ones((1, len(style)))
    return float(_Mmd(pictures, style).of(*ones)[0])


def cmmd(pictures: Tensor, style: Tensor) -> float:
    """Return 1000 times the biased estimate, as its authors report it."""
    inner = gaussian_kernel(pictures, pictures).mean() + gaussian_kernel(style, style).mean()
    return float(1000 * (inner - 2 * gaussian_kernel(pictures, style).mean()))


class _Mmd:
    """Unbiased MMD² with KID's kernel, for resamples given as counts [R, N] of each picture.

    A picture that is drawn twice is not compared with itself. No sample of different pictures has
    such a pair, and its kernel value would raise every resample above the estimate.
    """

    def __init__(self, pictures: Tensor, style: Tensor) -> None:
        self._own, self._style = (
            polynomial_kernel(pictures, pictures),
            polynomial_kernel(style, style),
        )
        self._cross = polynomial_kernel(pictures, style)

    def of(self, pictures: Values, style: Values) -> Values:
        cross = np.einsum("ri,ij,rj->r", pictures, self._cross, style, optimize=True)
        return (
            _between_different(self._own, pictures)
            + _between_different(self._style, style)
            - 2 * cross / (pictures.sum(1) * style.sum(1))
        )


def _between_different(kernel: Values, counts: Values) -> Values:
    """Return the mean of a kernel over pairs of different items, weighted by how often each was
    drawn.
    """
    off = kernel - np.diag(np.diag(kernel))
    pairs = counts.sum(1) ** 2 - (counts**2).sum(1)
    return np.einsum("ri,ij,rj->r", counts, off, counts, optimize=True) / np.maximum(pairs, 1)


@dataclass(frozen=True)
class Pictures:
    """Features of pictures of the same prompts and seeds, [N, D] of unit length.

    `begun`: pictures by the scales that the run began with, if those are another run's.
    """

    tuned: Tensor
    base: Tensor | None = None
    begun: Tensor | None = None

    @property
    def before(self) -> Tensor | None:
        """The features that a change is measured from."""
        return self.base if self.begun is None else self.begun


def distances(pictures: Pictures, style: Tensor) -> dict[str, object]:
    """Return KID and CMMD to the style's images, and their changes."""
    found: dict[str, Any] = {"value": cmmd(pictures.tuned, style)}
    if pictures.base is not None and pictures.before is not None:
        found |= {"base": cmmd(pictures.base, style)}
        found |= {"delta": found["value"] - cmmd(pictures.before, style)}
    if pictures.begun is not None:
        found["begun"] = cmmd(pictures.begun, style)
    return {"kid": _kid_summary(pictures, style), "cmmd": found}


def _kid_summary(pictures: Pictures, style: Tensor) -> dict[str, object]:
    tuned, before = pictures.tuned, pictures.before
    found: dict[str, Any] = {"value": kid(tuned, style), "ci95": None}
    if pictures.base is not None:
        found |= {"base": kid(pictures.base, style), "delta": None, "delta_ci95": None}
    if pictures.begun is not None:
        found["begun"] = kid(pictures.begun, style)
    if min(len(tuned), len(style)) < 2:
        return found
    drawn = intervals.counts(len(tuned)), intervals.counts(len(style), seed=intervals.SEED + 1)
    of_tuned = _Mmd(tuned, style).of(*drawn)
    found["ci95"] = intervals.interval(of_tuned)
    if before is not None:
        found["delta"] = found["value"] - (kid(before, style) or 0.0)
        found["delta_ci95"] = intervals.interval(of_tuned - _Mmd(before, style).of(*drawn))
    return found


def control_gap(
    held_out: Tensor, others: Tensor, style: Tensor, against: str
) -> dict[str, object] | None:
    """Return how far the similarity of the style's own images lies above that of other images.

    The style's own images are `held_out`; without them each image of `style` is compared with the
    rest. Return None if a side is empty.
    """
    own = similarity(held_out, style) if len(held_out) else leave_one_out(style)
    if not own or not len(others):
        return None
    other = similarity(others, style)
    return {
        "held_out": float(np.mean(own)),
        "others": float(np.mean(other)),
        "gap": float(np.mean(own) - np.mean(other)),
        "of": "held-out images" if len(held_out) else "training images, each against the others",
        "against": against,
        "ci95": intervals.of_difference(own, other),
        "n": [len(own), len(other)],
    }


def leave_one_out(style: Tensor) -> list[float]:
    """Return the similarity of each image to the rest of its set [N, D]; empty for fewer than
    three.
    """
    if len(style) < 3:
        return []
    images = style.double()
    rest = F.normalize(images.sum(0, keepdim=True) - images, dim=1)
    return [float(value) for value in (images * rest).sum(1)]


def nearest(
    pictures: Tensor,
    style: Tensor,
    names: Sequence[str],
    held_out: Tensor,
    base: Tensor | None = None,
) -> dict[str, object]:
    """Find the closest training image of each picture.

    `copies` lists pictures that are closer to one than every held-out image and every picture of
    the base.
    """
    closest, which = (pictures.double() @ style.double().T).max(1)
    most = int(closest.argmax())
    result: dict[str, object] = {
        "mean": float(closest.mean()),
        "max": float(closest[most]),
        "closest": {"picture": most, "image": names[int(which[most])]},
    }
    compared = {"held_out": held_out} | ({} if base is None else {"base": base})
    others = {
        name: (images.double() @ style.double().T).max(1).values
        for name, images in compared.items()
        if len(images)
    }
    for name, found in others.items():
        result |= {f"{name}_mean": float(found.mean()), f"{name}_max": float(found.max())}
    if others:
        usual = max(float(found.max()) for found in others.values())
        result |= {"usual_max": usual, "copies": int((closest > usual).sum())}
    return result


def diversity(pictures: Tensor) -> float | None:
    """Return 1 - mean cosine between different pictures, None for one picture."""
    if len(pictures) < 2:
        return None
    cosine = (pictures.double() @ pictures.double().T).numpy()
    return float(1 - _between_different(cosine, np.ones((1, len(pictures))))[0])


def score(
    pictures: Pictures, style: Tensor, names: Sequence[str], held_out: Tensor
) -> dict[str, object]:
    """Return all figures of style.

    Args:
        style: features of the training images, which are called `names`.
        held_out: features of other images in the style.
    """
    tuned, base, begun = pictures.tuned, pictures.base, pictures.begun
    found = similarity(tuned, style)
    result: dict[str, Any] = {"similarity": intervals.summary(found)}
    if base is not None:
        before = None if begun is None else similarity(begun, style)
        result["similarity"] |= intervals.gained(found, similarity(base, style), before)
        result["control"] = control_gap(held_out, base, style, "pictures of the base model")
    result |= distances(pictures, style)
    result["nearest"] = nearest(tuned, style, names, held_out, base)
    sets = {"tuned": tuned, "style": style, "base": base, "begun": begun}
    result["diversity"] = {name: diversity(one) for name, one in sets.items() if one is not None}
    result["n_style"], result["n_held_out"] = len(style), len(held_out)
    return result
