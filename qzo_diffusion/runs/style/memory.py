"""Plan the memory of a run from a model's configs and the settings, and find changes that reduce
it.

The number of probes in a forward pass follows from the plan if the user does not set it.
"""

import functools
import json
from dataclasses import replace

import torch
from torch import nn

from qzo_diffusion import devices
from qzo_diffusion.config.defaults import set_dotted
from qzo_diffusion.config.files import make_config
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.exact_product import blocks_of
from qzo_diffusion.diffusion import memory
from qzo_diffusion.diffusion.autoencoders import reduction
from qzo_diffusion.diffusion.families.family import Family
from qzo_diffusion.diffusion.gradient_memory import gradient_bytes
from qzo_diffusion.diffusion.memory import MemoryPlan, MethodPeak, ModelSize, Phase
from qzo_diffusion.diffusion.original_layout import LAYERS
from qzo_diffusion.diffusion.pipeline_shape import PipelineShape
from qzo_diffusion.diffusion.text_encoders import EncoderKind, dtype_of, empty_encoder
from qzo_diffusion.diffusion.transformer import empty_transformer
from qzo_diffusion.quant.stream import Quantization
from qzo_diffusion.runs import build
from qzo_diffusion.runs.style import pipeline
from qzo_diffusion.runs.style.rewards import scorer_bytes
from qzo_diffusion.runs.subspace import subspace_bytes

# In the order in which they are tried: first those that cost only time, last those that change
# the result.
CHANGES = (
    ("compute.dtype", "bfloat16"),
    ("train.micro_batch_size", 1),
    ("sample.batch_size", 1),
    ("reward.decode_at_once", 1),
    ("compute.vae_tile", 256),
    ("reward.second", "none"),
    ("text.t5", "nf4"),
    ("train.optimizer", "sgd"),
    ("data.resolution", 512),
    ("text.t5", "none"),
    ("data.resolution", 256),
)

SHARING, LARGEST, IN_CACHE = 16, 2**24, 2**22
"""The rows of a forward pass on a CPU share one reading of the weights. But tensors that no cache
holds slow down everything between the products. So a forward pass has 16 rows if the widest layer
gives at most 2^24 numbers for them, and more as long as those fill at most 4 MB
(docs/decisions/speed_and_memory.md D30)."""
METHODS = ("qzo", "fo-scales")  # that train the same numbers, so that one may choose
FEED_FORWARD = 4  # width of the feed-forward over that of the hidden states


def fitting_micro_batch(
    config: Config, runtime: pipeline.Runtime, images: int = 0, prompts: int = 0
) -> int:
    """Return how many probes of examples share a forward pass: the whole batch, or the largest
    power of two that fits and is fast.

    Raises:
        ModelError: the model's folder lacks something.
    """

    runtime = _with_shape(config, runtime)

    def training(count: int) -> float:
        return _of_steps(_phases(_with_rows(config, count), runtime, images, prompts))

    most = whole = config.examples * build.probes_at_once(config)
    available = memory.available_bytes(runtime.device)
    if available is not None:
        one, two = training(1), training(2)
        most = 1 + int((available - one) / (two - one))
    if runtime.device.type == "cpu":
        width, tokens = sizes(config, pipeline.shape_of(config, runtime))
        most = min(most, rows_on_cpu(width, tokens, runtime.dtype))
    return whole if most >= whole else 2 ** (max(1, most).bit_length() - 1)


def resolve_rows_(
    config: Config, runtime: pipeline.Runtime, images: int = 0, prompts: int = 0
) -> None:
    """Fill in how many rows a forward pass has, in steps and of samples, unless the user set
    it. Raises as `fitting_micro_batch`.
    """
    if config.train.micro_batch_size is None:
        config.train.micro_batch_size = fitting_micro_batch(config, runtime, images, prompts)
    resolve_drawn_(config, runtime, prompts)


def resolve_drawn_(config: Config, runtime: pipeline.Runtime, prompts: int) -> None:
    """Fill in how many pictures are sampled together, unless the user set it: the largest power of
    two that fits, or one.

    Args:
        prompts: how many are sampled.

    Raises:
        ModelError: the model's folder lacks something.
    """
    if config.sample.batch_size is not None:
        return
    runtime, available = _with_shape(config, runtime), memory.available_bytes(runtime.device)
    count = pipeline.MOST_DRAWN
    while (
        count > 1
        and available is not None
        and _of_samples(config, runtime, prompts, count) > available
    ):
        count //= 2
    config.sample.batch_size = count


def rows_on_cpu(width: int, image_tokens: int, dtype: torch.dtype) -> int:
    """Return the number of rows that is fast on a CPU. It is at least two: a single row shares
    nothing.
    """
    widest = FEED_FORWARD * width * image_tokens  # numbers in a row
    return max(2, min(SHARING, LARGEST // widest), IN_CACHE // (widest * dtype.itemsize))


def memory_plan(
    config: Config, runtime: pipeline.Runtime, images: int = 0, prompts: int = 0
) -> MemoryPlan:
    """Plan every phase on the run's device, with the changes that make it fit if it does not.

    Args:
        images, prompts: how many are kept encoded.

    Raises:
        ModelError: the model's folder lacks something.
    """
    runtime = _with_shape(config, runtime)
    available = memory.available_bytes(runtime.device)
    phases = _phases(config, runtime, images, prompts)
    methods = _peaks_by_method(config, runtime, images, prompts)
    plan = MemoryPlan(phases, runtime.device.type, available, methods=methods)
    if plan.fits:
        return plan
    changed, made = config, list[str]()
    for key, value in CHANGES:
        settings = changed.model_dump()
        set_dotted(settings, key, value)
        tried: Config = make_config(settings)
        dtype = devices.choose_dtype(tried.compute.dtype, runtime.device)
        there = replace(runtime, dtype=dtype)
        before = replace(runtime, dtype=devices.choose_dtype(changed.compute.dtype, runtime.device))
        if _peak(tried, there, images, prompts) >= _peak(changed, before, images, prompts):
            continue
        changed, made = tried, [*made, f"{key}={value}"]
        if available is None or _peak(changed, there, images, prompts) <= available:
            return replace(plan, changes=made)
    return plan


def _with_shape(config: Config, runtime: pipeline.Runtime) -> pipeline.Runtime:
    """Read the headers once for all plans that are tried."""
    return replace(runtime, shape=pipeline.shape_of(config, runtime))


def _peak(config: Config, runtime: pipeline.Runtime, images: int, prompts: int) -> float:
    return max(phase.total for phase in _phases(config, runtime, images, prompts))


def _phases(config: Config, runtime: pipeline.Runtime, images: int, prompts: int) -> list[Phase]:
    dtype, device, shape = runtime.dtype, runtime.device.type, pipeline.shape_of(config, runtime)
    found, family = shape.transformer, shape.family
    width, image_tokens = sizes(config, shape)
    sizes_of_data = family.denoiser.shape(found.config)
    outline = _outline(json.dumps(found.config, sort_keys=True))
    how = build.quantization(config.quant, family.denoiser.skip)
    size = ModelSize.of_files(outline, found.entries, how, dtype, width)
    vae_config, vae = shape.vae.config, memory.stored_bytes(shape.vae.entries, torch.float32)
    side = config.data.resolution or shape.native_resolution
    text_tokens = family.texts.tokens(config.text.t5_tokens)
    libraries = memory.LIBRARIES[device]
    on_device = (
        devices.choose_device(config.compute.vae_device).type == device
        if config.compute.vae_device
        else True
    )
    tile = config.compute.vae_tile

    def vae_work(direction: str) -> dict[str, float]:
        return (
            {
                "VAE": vae,
                f"{direction} a tile": memory.vae_bytes(vae_config, direction, side, side, tile),
            }
            if on_device
            else {}
        )

    kept = (
        images
        * sizes_of_data.channels
        * (side // reduction(vae_config)) ** 2
        * 4
        * (2 if config.data.flip else 1)
    )
    kept += prompts * text_tokens * sizes_of_data.text_width * dtype.itemsize
    data = {"encoded data": float(kept)} if device == "cpu" else {}
    base = {"libraries": libraries}
    guided = family.sampling.passes(config.sample.guidance)
    rows = _trained_rows(config, family)
    pictures = config.sample.batch_size or pipeline.MOST_DRAWN
    drawn = guided * min(pictures, max(1, prompts))
    # a copy of the scales, or of the codes that are trained in their place
    copied = size.weights if config.method == "quzo" else 4.0 * size.scales
    copy = {} if config.sample.tuned_between is None else {"the base's scales": copied}
    blocks = len(blocks_of(outline)), bool(found.config.get("dual_attention_layers"))
    tokens = image_tokens, text_tokens
    scorers = scorer_bytes(config, runtime.folder) if config.reward.scores else {}
    resident = copy | base | data | {"VAE": vae if on_device else 0.0, "weights": size.weights}
    return [
        Phase("encode", base | _largest_encoder(config, runtime, shape)),
        Phase("images", base | data | vae_work("encode")),
        Phase(
            "load",
            resident
            | {"reading": memory.reading_bytes(found.entries, dtype, device, size.largest)},
        ),
        Phase(
            "train",
            resident
            | scorers
            | _training(config, size, blocks, (*tokens, rows), runtime, vae_work("decode")),
        ),
        Phase(
            "sample",
            resident
            | scorers
            | _sampling(
                size,
                image_tokens,
                text_tokens,
                (drawn, rows),
                runtime,
                vae_work("decode"),
            ),
        ),
    ]


def _with_rows(config: Config, count: int) -> Config:
    """Return the settings with so many probes in a forward pass."""
    train = config.train.model_copy(update={"micro_batch_size": count})
    return config.model_copy(update={"train": train})


def _of_steps(phases: list[Phase]) -> float:
    return next(phase.total for phase in phases if phase.name == "train")


def _of_samples(config: Config, runtime: pipeline.Runtime, prompts: int, count: int) -> float:
    sample = config.sample.model_copy(update={"batch_size": count})
    tried = config.model_copy(update={"sample": sample})
    return next(one.total for one in _phases(tried, runtime, 0, prompts) if one.name == "sample")


def _peaks_by_method(
    config: Config, runtime: pipeline.Runtime, images: int, prompts: int
) -> dict[str, MethodPeak]:
    """Return the peaks of a run by forward passes and by gradients, one row or image at once; of
    transformers alone, whose blocks the plan of gradients counts.
    """
    is_transformer = not LAYERS.isdisjoint(pipeline.shape_of(config, runtime).transformer.config)
    if config.method not in METHODS or config.reward.scores or not is_transformer:
        return {}
    found = {}
    for method in METHODS:
        tried = _with_rows(config, 1).model_copy(update={"method": method})
        phases = _phases(tried, runtime, images, prompts)
        found[method] = MethodPeak(max(phase.total for phase in phases), _of_steps(phases))
    return found


def _trained_rows(config: Config, family: Family) -> int:
    """Return the rows of a forward pass of a step. Pictures that are scored may be drawn with
    guidance."""
    probes = config.train.micro_batch_size or config.examples * build.probes_at_once(config)
    return probes * (family.sampling.passes(config.reward.guidance) if config.reward.scores else 1)


def _training(
    config: Config,
    size: ModelSize,
    blocks: tuple[int, bool],
    counts: tuple[int, int, int],
    runtime: pipeline.Runtime,
    decoding: dict[str, float],
) -> dict[str, float]:
    """Return what a step needs beside weights.

    Args:
        blocks: how many the model has, and whether some have a second attention.
        counts: tokens of the image and of the text, and rows of a forward pass.
        decoding: of one picture. Pictures that are scored are decoded after their forward passes;
            both are counted, as an allocator may keep the memory of either.
    """
    device, level = runtime.device.type, config.qzo.parametrization
    if config.method == "fo-scales":
        tokens, rows = counts[:2], counts[2]
        trained = level, config.train.state_bits
        return gradient_bytes(size, blocks, tokens, rows, runtime.dtype, trained, device)
    forward = memory.forward_bytes(size, *counts, runtime.dtype)
    found = {
        "forward": forward,
        "overrides": memory.override_bytes(size, "codes" if config.trains_codes else level, device),
        "trained numbers": memory.trained_bytes(
            size, level, config.train.optimizer, config.train.state_bits
        ),
    }
    if config.qzo.subspace is not None:
        found["subspace"] = subspace_bytes(config.qzo.subspace)
    if config.reward.scores:
        decode = sum(value for name, value in decoding.items() if name != "VAE")
        found["decode"] = decode * config.reward.decode_at_once
    return found


@functools.lru_cache(maxsize=2)
def _outline(transformer: str) -> nn.Module:
    """Return the model of a config as JSON, without memory; a plan needs it a dozen times."""
    return empty_transformer(json.loads(transformer))


@functools.lru_cache(maxsize=1)
def _large_outline(kind: EncoderKind, config: str) -> nn.Module:
    """Return the large text encoder in the same way."""
    return empty_encoder(kind, json.loads(config))


def sizes(config: Config, shape: PipelineShape) -> tuple[int, int]:
    """Return the width of the hidden states, and the number of tokens of an image."""
    side = config.data.resolution or shape.native_resolution
    own = shape.family.denoiser.shape(shape.transformer.config)
    return own.width, (side // (reduction(shape.vae.config) * own.latents)) ** 2


def _sampling(
    size: ModelSize,
    image_tokens: int,
    text_tokens: int,
    counts: tuple[int, int],
    runtime: pipeline.Runtime,
    decoding: dict[str, float],
) -> dict[str, float]:
    """Return the larger of denoising and decoding, which follow each other.

    A CPU's allocator keeps the memory of forward passes of samples and of training.
    """
    drawn, trained = counts
    count = max(drawn, trained) if runtime.device.type == "cpu" else drawn
    forward = memory.forward_bytes(size, image_tokens, text_tokens, count, runtime.dtype)
    decode = sum(value for name, value in decoding.items() if name != "VAE")
    if runtime.device.type == "cpu":
        return {"forward": forward, "decode": decode}
    return {"forward": forward} if forward >= decode else {"decode": decode}


def _largest_encoder(
    config: Config, runtime: pipeline.Runtime, shape: PipelineShape
) -> dict[str, float]:
    """Return the largest text encoder, with the temporary tensors of reading it: only one is loaded
    at a time.
    """
    texts = shape.family.texts
    large = shape.encoders.get(texts.large or "")
    mode = pipeline.t5_mode_of(config, None if large is None else large.nbytes)
    sizes: dict[str, float] = {}
    for name, part in shape.encoders.items():
        if name == texts.large and mode == "none":
            continue
        dtype = dtype_of(texts.classes[name], runtime.dtype)
        reading = memory.reading_bytes(part.entries, dtype, runtime.device.type, 0)
        if name == texts.large and mode == "nf4":
            empty = _large_outline(texts.classes[name], json.dumps(part.config, sort_keys=True))
            weights = ModelSize.of(empty, Quantization(), dtype).weights
        else:
            weights = memory.stored_bytes(part.entries, dtype)
        sizes[name] = weights + reading
    name = max(sizes, key=lambda part: sizes[part])
    return {name: sizes[name]}
