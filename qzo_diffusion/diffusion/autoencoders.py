"""The kinds of VAE, by their class in diffusers: their sizes, and how the numbers that they give
become the latents that a denoiser takes.

Latents are [B, C, h, w] for every kind, with a variance of about one.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Config = Mapping[str, Any]
PATCH = 2  # latents along a side of a square with statistics of its own


@dataclass(frozen=True)
class Autoencoder:
    """One kind.

    channels: the setting that counts those of latents. wrong: yields settings that can't be. maps:
    channels of the feature maps, from the finest; each next one has half the side. latents: of the
    numbers [B, C, h, w] that the VAE gives; plain: the inverse. frames: pictures are videos of one
    frame, [B, C, 1, h, w]. set_tile: of a side in pixels. full_size: feature maps of the second
    finest width at the peak of encoding and of decoding, measured on a CPU.
    """

    channels: str
    wrong: Callable[[Config], Iterator[str]]
    maps: Callable[[Config], list[int]]
    latents: Callable[[Any, Tensor], Tensor]
    plain: Callable[[Any, Tensor], Tensor]
    set_tile: Callable[[Any, int], None]
    full_size: Mapping[str, float]
    frames: bool = False

    def encoded(self, vae: Any, pixels: Tensor) -> Tensor:
        """Return the latents of pictures [B, 3, H, W] in [-1, 1], without noise."""
        images = pixels.to(vae.device, vae.dtype)
        mean = vae.encode(images.unsqueeze(2) if self.frames else images).latent_dist.mean
        return self.latents(vae, mean.squeeze(2) if self.frames else mean)

    def decoded(self, vae: Any, latents: Tensor) -> Tensor:
        """Return the pictures [B, 3, H, W] of latents [B, C, h, w] fp32."""
        z = self.plain(vae, latents).to(vae.device, vae.dtype)
        pixels: Tensor = vae.decode(z.unsqueeze(2) if self.frames else z).sample
        return pixels.squeeze(2) if self.frames else pixels


def reduction(config: Config) -> int:
    """Return the number of pixels along a side of one latent."""
    return int(2 ** (len(kind_of(config).maps(config)) - 1))


def latent_channels(config: Config) -> int:
    """Return the number of channels of latents."""
    return int(config[kind_of(config).channels])


def kind_of(config: Config) -> Autoencoder:
    """Return the kind that a config's class names. Raises KeyError for an unknown one."""
    return KINDS[config.get("_class_name", PLAIN)]


def kind_of_model(vae: Any) -> Autoencoder:
    """Return the kind of a loaded VAE."""
    return KINDS.get(type(vae).__name__, KINDS[PLAIN])


def is_finite(value: Any) -> bool:
    """Return whether a setting is a finite number, or a list of them."""
    if isinstance(value, list):
        return bool(value) and all(map(is_finite, value))
    return type(value) in (int, float) and math.isfinite(value)


def _positive(value: Any) -> bool:
    return type(value) is int and value > 0


def _are_positive(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(map(_positive, values))


def _wrong(config: Config) -> Iterator[str]:
    if not _are_positive(config.get("block_out_channels")):
        yield "block_out_channels"
    if config.get("scaling_factor") == 0:
        yield "scaling_factor"
    if not _positive(config.get("latent_channels")):
        yield "latent_channels"


def _wrong_of_videos(config: Config) -> Iterator[str]:
    if not _are_positive(config.get("dim_mult")):
        yield "dim_mult"
    for name in ("base_dim", "z_dim"):
        if not _positive(config.get(name)):
            yield name
    if _count(config.get("temperal_downsample")) + 1 != _count(config.get("dim_mult")):
        yield "temperal_downsample"
    for name in ("latents_mean", "latents_std"):
        if _count(config.get(name)) != config.get("z_dim"):
            yield name
    if 0 in config["latents_std"]:
        yield "latents_std"


def _count(value: Any) -> int:
    return len(value) if isinstance(value, list) else 0


def _shift(vae: Any) -> float:
    return float(vae.config.shift_factor or 0.0)


def _shifted(vae: Any, z: Tensor) -> Tensor:
    return (z - _shift(vae)) * vae.config.scaling_factor


def _unshifted(vae: Any, latents: Tensor) -> Tensor:
    return latents / vae.config.scaling_factor + _shift(vae)


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of each channel of a square, [1, 4 · C, 1, 1]."""
    mean, variance = vae.bn.running_mean, vae.bn.running_var + vae.config.batch_norm_eps
    whole = [one.view(1, -1, 1, 1).to(like.device, like.dtype) for one in (mean, variance.sqrt())]
    return whole[0], whole[1]


def _normalized(vae: Any, z: Tensor) -> Tensor:
    mean, deviation = _statistics(vae, z)
    return F.pixel_shuffle((F.pixel_unshuffle(z, PATCH) - mean) / deviation, PATCH)


def _unnormalized(vae: Any, latents: Tensor) -> Tensor:
    mean, deviation = _statistics(vae, latents)
    return F.pixel_shuffle(F.pixel_unshuffle(latents, PATCH) * deviation + mean, PATCH)


def _of_channels(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of each channel, [1, C, 1, 1]."""
    settings = (vae.config.latents_mean, vae.config.latents_std)
    whole = [torch.tensor(one).view(1, -1, 1, 1).to(like.device, like.dtype) for one in settings]
    return whole[0], whole[1]


def _standard(vae: Any, z: Tensor) -> Tensor:
    mean, deviation = _of_channels(vae, z)
    return (z - mean) / deviation


def _from_standard(vae: Any, latents: Tensor) -> Tensor:
    mean, deviation = _of_channels(vae, latents)
    return latents * deviation + mean


def _set_tile(vae: Any, tile: int) -> None:
    vae.enable_tiling()
    vae.tile_sample_min_size = tile
    vae.tile_latent_min_size = tile // reduction(vae.config)


def _set_tile_of_videos(vae: Any, tile: int) -> None:
    vae.enable_tiling(tile, tile, tile * 3 // 4, tile * 3 // 4)


PLAIN = "AutoencoderKL"
_OF_PICTURES: Mapping[str, Any] = {
    "channels": "latent_channels",
    "wrong": _wrong,
    "maps": lambda config: config["block_out_channels"],
    "set_tile": _set_tile,
    "full_size": {"encode": 2.7, "decode": 5.2},
}
KINDS: Mapping[str, Autoencoder] = {
    PLAIN: Autoencoder(latents=_shifted, plain=_unshifted, **_OF_PICTURES),
    "AutoencoderKLFlux2": Autoencoder(latents=_normalized, plain=_unnormalized, **_OF_PICTURES),
    "AutoencoderKLQwenImage": Autoencoder(
        channels="z_dim",
        wrong=_wrong_of_videos,
        maps=lambda config: [config["base_dim"] * times for times in config["dim_mult"]],
        latents=_standard,
        plain=_from_standard,
        set_tile=_set_tile_of_videos,
        # a forward has 2 and 3 times the live tensors of the plain kind, whose peaks these are
        full_size={"encode": 2.7 * 2.0, "decode": 5.2 * 3.0},
        frames=True,
    ),
}
