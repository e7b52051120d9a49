"""Build the parts of a pipeline from a config of pictures.

The code below this file knows no config.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from qzo_diffusion.config.style import Config
from qzo_diffusion.core.errors import ConfigError
from qzo_diffusion.core.parametrization import Parametrization
from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.devices import choose_device, choose_dtype
from qzo_diffusion.diffusion import text_encoders, vae
from qzo_diffusion.diffusion.cache import TensorCache
from qzo_diffusion.diffusion.encoded_prompt import EncodedPrompt
from qzo_diffusion.diffusion.families.family import Family
from qzo_diffusion.diffusion.model_folder import (
    check_model_folder,
    family_of_folder,
    is_distilled,
    load_scheduler,
    native_resolution,
)
from qzo_diffusion.diffusion.objectives import Objective, with_min_snr
from qzo_diffusion.diffusion.pipeline_shape import PipelineShape, check_shape, read_shape
from qzo_diffusion.diffusion.prompt_encoder import PromptEncoder
from qzo_diffusion.diffusion.prompts import Prompt
from qzo_diffusion.diffusion.sample import Sample
from qzo_diffusion.diffusion.sampling import Sampler
from qzo_diffusion.diffusion.transformer import empty_transformer, find_transformer
from qzo_diffusion.quant.available import bitsandbytes_problem
from qzo_diffusion.quant.stream import Quantization
from qzo_diffusion.runs import build
from qzo_diffusion.runs.loading import Source, load_quantized
from qzo_diffusion.runs.style.choose_model import choose_model, is_tiny

MOST_DRAWN = 8  # pictures that are sampled together where all fit

LARGE_T5 = 2e9  # bytes of T5 or of a language model; T5-XXL has 9.5e9


@dataclass(frozen=True)
class Runtime:
    """The pipeline folder, the device, and the dtype of forward passes.

    shape: the shape of the pipeline, if it has been read.
    """

    folder: Path
    device: torch.device
    dtype: torch.dtype
    shape: PipelineShape | None = None


def find_runtime(config: Config) -> Runtime:
    """Find out everything about the model that is known before anything heavy is loaded.

    Raises:
        ModelError: it is missing, or a file of it is.
        ConfigError: there is no such device.
    """
    folder, _ = choose_model(config.model)
    shape = check_model(config, folder)
    device = choose_device(config.compute.device)
    return Runtime(folder, device, choose_dtype(config.compute.dtype, device), shape)


def load_base(config: Config, runtime: Runtime) -> tuple[nn.Module, ScaleSet, Parametrization]:
    """Load the 4-bit transformer, its live scales, and theta, all as they are before a run."""
    transformer = quantized_transformer(config, runtime.folder, runtime.device, runtime.dtype)
    own_patch = family_of(config, runtime.folder).denoiser.own_patch
    return transformer, *build.scales_and_theta(config, transformer, own_patch=own_patch)


def load_scales(config: Config, runtime: Runtime) -> tuple[nn.Module, ScaleSet]:
    """Load the same for verbs that draw no directions; the file of a subspace may be gone."""
    without = config.qzo.model_copy(update={"subspace": None})
    transformer, scales, _ = load_base(config.model_copy(update={"qzo": without}), runtime)
    return transformer, scales


def family_of(config: Config, folder: Path) -> Family:
    """Return the family of a run's model: the one that the settings name, or that its folder or its
    single file states.

    Raises:
        ConfigError: no family has the name that the settings give.
        ModelError: the model is of no known family.
    """
    file = Path(config.model)
    return family_of_folder(folder, config.family, file if file.is_file() else None)


def objective_of(config: Config, folder: Path) -> Objective:
    """Return the objective that a model was trained with, weighted as the settings say.

    Raises:
        ConfigError: it has no such weights.
        ModelError: the scheduler's config is damaged.
    """
    family = family_of(config, folder)
    objective = family.objective(load_scheduler(folder, family))
    return with_min_snr(objective, config.sigma.min_snr)


def check_model(config: Config, folder: Path) -> PipelineShape:
    """Refuse a pipeline that lacks a part or whose parts don't fit, before anything is loaded.

    Raises:
        ModelError: see above.
    """
    place, family = transformer_place(config, folder), family_of(config, folder)
    own = family.denoiser.part
    elsewhere = (own,) if place != folder / own else ()
    with_t5 = config.text.t5 != "none"
    if not with_t5 and family.texts.large and not family.texts.large_optional:
        raise ConfigError(
            f"text.t5=none with a model of {family.title}",
            f"auto, nf4 or full: its prompts are those of {family.texts.large}/",
            "leave text.t5 out",
        )
    large = family.texts.large
    without = () if with_t5 or large is None else family.texts.of_part(large)
    check_model_folder(folder, family, without=(*elsewhere, *without))
    shape = read_shape(folder, family, place, with_t5=with_t5)
    check_shape(shape, folder)
    objective_of(config, folder)
    return shape


def shape_of(config: Config, runtime: Runtime) -> PipelineShape:
    """Return the shape of a run's pipeline. Raises ModelError for damaged configs or headers."""
    if runtime.shape is not None:
        return runtime.shape
    family = family_of(config, runtime.folder)
    return read_shape(runtime.folder, family, transformer_place(config, runtime.folder))


def transformer_place(config: Config, folder: Path) -> Path:
    """Return the path of the transformer's weights: in the pipeline, or the one that `transformer`
    or a single file as `model` names.
    """
    if config.transformer is not None:
        return Path(config.transformer)
    if Path(config.model).is_file():
        return Path(config.model)
    return folder / family_of(config, folder).denoiser.part


def resolve_sampling_(config: Config, family: Family, folder: Path) -> None:
    """Fill in the steps and the guidance that suit the model, unless the user set them."""
    own = family.sampling
    steps, guidance = (16, 2.0) if is_tiny(folder) else (own.steps, own.guidance)
    if own.of_distilled and is_distilled(folder, family):
        steps, guidance = own.of_distilled
    config.sample.steps = config.sample.steps or steps
    if config.sample.guidance is None:
        config.sample.guidance = guidance


def sampler(
    config: Config,
    runtime: Runtime,
    transformer: nn.Module,
    vae: Any,
    prompts: Sequence[Prompt],
    encoded: Mapping[str, EncodedPrompt],
) -> Sampler:
    """Return a sampler of square images, at the run's resolution or the model's own."""
    folder, family = runtime.folder, family_of(config, runtime.folder)
    resolve_sampling_(config, family, folder)
    side, settings = config.data.resolution or native_resolution(folder, family), config.sample
    return Sampler(
        family,
        transformer,
        load_scheduler(folder, family),
        vae,
        [encoded[prompt.text] for prompt in prompts],
        [
            encoded[settings.negative_prompt if prompt.negative is None else prompt.negative]
            for prompt in prompts
        ],
        width=side,
        height=side,
        steps=settings.steps or 1,
        guidance=settings.guidance or 0.0,
        seed=settings.seed,
        batch_size=settings.batch_size or MOST_DRAWN,
        device=runtime.device,
        dtype=runtime.dtype,
    )


def prompt_encoder(
    config: Config, folder: Path, device: torch.device, dtype: torch.dtype
) -> PromptEncoder:
    """Return an encoder of prompts, which loads the large encoder as `text.t5` says.

    A 4-bit copy of it is kept for new prompts.
    """
    family = family_of(config, folder)
    mode = t5_mode(config, folder, family)

    def load(part: str) -> nn.Module:
        kind = family.texts.classes[part]
        own = text_encoders.dtype_of(kind, dtype)
        if part != family.texts.large or mode != "nf4":
            return text_encoders.load_text_encoder(folder, part, kind, dtype=own, device=device)
        source = Source(
            text_encoders.read_encoder_entries(folder, part, kind),
            lambda: text_encoders.empty_text_encoder(folder, part, kind),
        )
        return text_encoders.ready(
            load_quantized(
                source,
                Quantization(
                    backend="bnb" if bitsandbytes_problem(device) is None else "reference"
                ),
                dtype=own,
                device=device,
                cache=build.copies_folder(config),
            )
        )

    return PromptEncoder(
        folder,
        tensor_cache(config),
        family=family,
        device=device,
        dtype=dtype,
        t5_tokens=config.text.t5_tokens,
        t5=mode,
        load=load,
    )


def t5_mode(config: Config, folder: Path, family: Family) -> Literal["nf4", "full", "none"]:
    size, part = None, family.texts.large
    if part is not None and config.text.t5 == "auto" and text_encoders.has_part(folder, part):
        entries = text_encoders.read_encoder_entries(folder, part, family.texts.classes[part])
        size = sum(entry.nbytes for entry in entries.values())
    return t5_mode_of(config, size)


def t5_mode_of(config: Config, size: float | None) -> Literal["nf4", "full", "none"]:
    """Return how to load a large encoder of `size` bytes on disk; None is none."""
    if config.text.t5 != "auto":
        return config.text.t5
    if size is None:
        return "none"
    return "nf4" if size > LARGE_T5 else "full"


def load_vae(config: Config, folder: Path, device: torch.device) -> Any:
    compute = config.compute
    return vae.load_vae(
        folder,
        family_of(config, folder),
        choose_device(compute.vae_device) if compute.vae_device else device,
        tile=compute.vae_tile,
    )


def tiles(config: Config, samples: Sequence[Sample]) -> str:
    """Describe how images are cut for the VAE, if any is.

    Tiles change latents a little, so this belongs to their cache key.
    """
    tile = config.compute.vae_tile
    cut = tile is not None and any(max(sample.width, sample.height) > tile for sample in samples)
    return f"/{tile}" if cut else ""


def tensor_cache(config: Config) -> TensorCache:
    return TensorCache(build.cache_folder(config) / "tensors")


def quantized_transformer(
    config: Config, folder: Path, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """Load the 4-bit transformer for tuning and sampling. Raises ModelError."""
    family = family_of(config, folder)
    found = find_transformer(transformer_place(config, folder), family)
    source = Source(found.entries, lambda: empty_transformer(found.config))
    return load_quantized(
        source,
        build.quantization(config.quant, family.denoiser.skip),
        dtype=dtype,
        device=device,
        cache=build.copies_folder(config),
    )
