"""Encode every image by the VAE once, before training; the VAE can be freed afterwards.

Latents are found by sample id, and in the cache by the bytes of the file. They are never found by
position or step, so a new image in the folder or a resumed run cannot pair a picture with the
caption of another.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.diffusion.cache import TensorCache
from qzo_diffusion.diffusion.masks import open_masked, weights_of
from qzo_diffusion.diffusion.pixels import to_pixels
from qzo_diffusion.diffusion.sample import Sample

# Raise it whenever `to_pixels` or the file layout gives other numbers, so that old entries are
# not found. Before 2, rotated TIFFs were turned twice. Before 3, colour profiles were ignored.
FORMAT_VERSION = 3


@dataclass(frozen=True)
class LatentSet:
    """Latents of all samples, on the CPU, in the dtype of the encoder's output.

    masks: how much each latent counts, fp32 [1, h, w] in [0, 1], of the samples that have a mask.
    """

    by_key: Mapping[tuple[str, bool], torch.Tensor]
    masks: Mapping[tuple[str, bool], torch.Tensor] = field(default_factory=dict)

    def latents(self, sample_id: str, flipped: bool) -> torch.Tensor:
        """Return the latents [channels, height / 8, width / 8] of a sample.

        Raises:
            KeyError: the id or its mirror image was not encoded.
        """
        return self.by_key[sample_id, flipped]

    def weights(self, keys: Sequence[tuple[str, bool]]) -> torch.Tensor | None:
        """Return how much each latent of these samples of one shape counts, [B, 1, h, w].

        Return None where no sample of the set has a mask.
        """
        if not self.masks:
            return None
        whole = torch.ones(1, *self.by_key[keys[0]].shape[-2:])
        return torch.stack([self.masks.get(key, whole) for key in keys])

    def joined(self, other: "LatentSet") -> "LatentSet":
        """Return the samples of both."""
        return LatentSet({**self.by_key, **other.by_key}, {**self.masks, **other.masks})


def encode_samples(
    samples: Sequence[Sample],
    encode: Callable[[torch.Tensor], torch.Tensor],
    *,
    cache: TensorCache,
    encoder_id: str,
    dtype: str,
    flip: bool,
    progress: Callable[[int, int], None] | None = None,
) -> LatentSet:
    """Return the latents of every sample, and of its mirror image if `flip`.

    Latents in the cache are not computed again.

    Args:
        encode: float32 [1, 3, height, width] in [-1, 1] -> latents [1, channels, h, w]. It is
            called without gradients, for one image at a time that is not in the cache.
        encoder_id: names the encoder and its weights.
        dtype: the precision of the encoder, such as "bfloat16"; part of the key.
        progress: called with (done, total) after each image.

    Raises:
        BadImage: a file became unreadable since the folder was read.
        ModelError: the encoder gave NaN or infinite latents.
        OutputError: the cache cannot be written.
    """
    wanted = [
        (sample, flipped) for sample in samples for flipped in ((False, True) if flip else (False,))
    ]
    found: dict[tuple[str, bool], torch.Tensor] = {}
    masks: dict[tuple[str, bool], torch.Tensor] = {}
    for done, (sample, flipped) in enumerate(wanted, start=1):
        key = _key(sample, flipped, encoder_id, dtype)
        stored = cache.get(key)
        if stored is None:
            stored = _encode_one(sample, flipped, encode)
            cache.put(key, stored)
        found[sample.id, flipped] = stored["latents"]
        if "mask" in stored:
            masks[sample.id, flipped] = stored["mask"]
        if progress is not None:
            progress(done, len(wanted))
    return LatentSet(found, masks)


def _key(
    sample: Sample, flipped: bool, encoder_id: str, dtype: str
) -> dict[str, str | int | float | bool]:
    return {
        "kind": "latents",
        "version": FORMAT_VERSION,
        "sha256": sample.sha256,
        "width": sample.width,
        "height": sample.height,
        "flip": flipped,
        "encoder": encoder_id,
        "dtype": dtype,
    }


def _encode_one(
    sample: Sample, flipped: bool, encode: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the latents, and the weights of a masked sample."""
    opened, mask = open_masked(sample.path, sample.mask)
    pixels = to_pixels(opened.image, sample.width, sample.height, flipped)
    # no_grad, not inference_mode: first-order training keeps the result for its backward pass.
    with torch.no_grad():
        latents = encode(pixels[None])
    if latents.ndim != 4 or latents.shape[0] != 1:
        raise ValueError(
            f"the encoder gave {tuple(latents.shape)} for one image, not [1, channels, height, "
            "width]"
        )
    if not torch.isfinite(latents).all():
        raise ModelError(
            f"NaN or infinite latents for {sample.path}",
            "an encoder that gives finite numbers",
            "choose compute.dtype=float32 or bfloat16: float16 overflows in some VAEs",
        )
    found = {"latents": latents[0].detach().cpu().contiguous()}
    if mask is not None:
        found["mask"] = weights_of(mask, sample, flipped, latents)
    return found
