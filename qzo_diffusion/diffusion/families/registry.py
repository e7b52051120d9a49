"""The families, and the one that a model belongs to."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from qzo_diffusion.core.errors import ConfigError
from qzo_diffusion.diffusion.families.family import Family, Published
from qzo_diffusion.diffusion.families.flux1 import FLUX1
from qzo_diffusion.diffusion.families.flux2 import FLUX2
from qzo_diffusion.diffusion.families.qwen_image import QWEN_IMAGE
from qzo_diffusion.diffusion.families.sd3 import SD3
from qzo_diffusion.diffusion.families.sd15 import SD15
from qzo_diffusion.diffusion.families.sdxl import SDXL
from qzo_diffusion.diffusion.families.zimage import ZIMAGE

FAMILIES = (SD3, FLUX1, FLUX2, QWEN_IMAGE, ZIMAGE, SDXL, SD15)
DEFAULT = FAMILIES[0]  # of configs that name no class
DEFAULT_MODEL = next(iter(DEFAULT.published))  # by its Hub id; `--model auto` looks for it


def by_name(name: str) -> Family:
    """Return the family of `--family`.

    Raises:
        ConfigError: there is none of that name; the message lists the known ones.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    raise ConfigError(f"family = {name}", known(), "use one of these names, or leave it out")


def of_pipeline(class_name: str) -> Family | None:
    """Return the family of a pipeline's class in diffusers, also of its variants."""
    for family in FAMILIES:
        names = [name.removesuffix("Pipeline") for name in family.sampling.pipelines]
        if any(class_name == f"{name}{kind}Pipeline" for name in names for kind in VARIANTS):
            return family
    return None


VARIANTS = ("", "Img2Img", "Inpaint")


def of_names(names: Iterable[str]) -> Family | None:
    """Return the family of a single file's tensors."""
    found = list(names)
    for family in FAMILIES:
        if family.denoiser.layout is not None and family.denoiser.layout.is_original(found):
            return family
    return None


def of_hub_id(name: str) -> Family | None:
    """Return the family that a Hub id seems to name."""
    return next((one for one in FAMILIES if re.search(one.hub.ids, name.lower())), None)


def of_gguf(architecture: str) -> Family | None:
    """Return the family of the architecture that a GGUF file states."""
    return next((one for one in FAMILIES if architecture in one.gguf), None)


def published(name: str) -> tuple[Family, Published] | None:
    """Return the family and the shape of a published model, by its Hub id."""
    for family in FAMILIES:
        if name in family.published:
            return family, family.published[name]
    return None


def family_of(config: Mapping[str, Any]) -> Family | None:
    """Return the family of a denoiser's config."""
    class_name = config.get("_class_name", DEFAULT.denoiser.class_name)
    for family in FAMILIES:
        if family.denoiser.class_name == class_name and family.denoiser.owns(config):
            return family
    return None


def known() -> str:
    """Name all families in words, for an error."""
    return "one of " + ", ".join(f"{family.name} ({family.title})" for family in FAMILIES)
