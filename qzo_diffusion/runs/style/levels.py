"""The noise levels at which samples of a run use its tuned scales: `sample.tuned_between`."""

from collections.abc import Sequence

from torch import nn

from qzo_diffusion.config.files import make_config
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.diffusion.families.family import Family
from qzo_diffusion.diffusion.levels import base_outside


def with_levels(config: Config, levels: Sequence[float] | None) -> Config:
    """Return `config` with these levels; None leaves its own.

    Raises:
        ConfigError: they are no noise levels, or the first is not below the second.
    """
    if levels is None:
        return config
    settings = config.model_dump()
    settings["sample"]["tuned_between"] = list(levels)
    return make_config(settings)


def for_samples(
    config: Config, family: Family, transformer: nn.Module, scales: ScaleSet
) -> nn.Module:
    """Return the transformer that samples call; the live scales must still be the base's.

    Where `sample.tuned_between` is given, it keeps a copy of the base's scales.
    """
    levels = config.sample.tuned_between
    if levels is None:
        return transformer
    base = {name: tensor.clone() for name, tensor in scales.tensors().items()}
    level = family.denoiser.level
    return base_outside(transformer, levels, base, lambda: scales, level)
