"""From a config to objects: the only file that knows every floor.

Below it nothing has heard of a config.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qzo_diffusion import resources
from qzo_diffusion.config.llm import LlmConfig
from qzo_diffusion.config.sections import QuantConfig, RunConfig
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.errors import ConfigError, ModelError
from qzo_diffusion.core.journal import MOST_SCALARS
from qzo_diffusion.core.optimizer import Adam, Optimizer, Schedule, make_optimizer, make_schedule
from qzo_diffusion.core.oracle import exact_gradient
from qzo_diffusion.core.parametrization import Parametrization
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.core.probing import Probing
from qzo_diffusion.core.quzo import Codes, ErrorFeedback
from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.core.weights import WeightHandle
from qzo_diffusion.devices import choose_device, choose_dtype
from qzo_diffusion.diffusion import memory, sd3, text_encoders, vae
from qzo_diffusion.diffusion.cache import TensorCache
from qzo_diffusion.diffusion.pipeline_shape import PipelineShape, check_shape, read_shape
from qzo_diffusion.diffusion.prompts import Prompt
from qzo_diffusion.diffusion.sampling import Sampler
from qzo_diffusion.diffusion.style_folder import Sample
from qzo_diffusion.diffusion.transformer import empty_transformer, find_transformer
from qzo_diffusion.files import free_bytes
from qzo_diffusion.llm.gguf_file import is_gguf
from qzo_diffusion.quant.base import fingerprint
from qzo_diffusion.quant.choose import chosen, last_readers, matching
from qzo_diffusion.quant.load import find_codes, find_scales, frozen_fingerprint, handles_of
from qzo_diffusion.quant.stream import Quantization
from qzo_diffusion.quant.weights import read_entries
from qzo_diffusion.runs.loading import Source, load_quantized
from qzo_diffusion.train.first_order import first_order_step
from qzo_diffusion.train.loop import TakeStep

DOWNLOAD = 30e9  # bytes of the large model with all its parts
LARGE_T5 = 2e9  # bytes; T5-XXL has 9.5e9
BIG_MODEL = "stabilityai/stable-diffusion-3.5-large"
GATED = "stabilityai/stable-diffusion-3"  # what the names of gated models begin with


@dataclass(frozen=True)
class Runtime:
    """Which pipeline folder, and on which device and in which dtype its forwards run.

    shape: of the pipeline, where it has been read."""

    folder: Path
    device: torch.device
    dtype: torch.dtype
    shape: PipelineShape | None = None


def find_runtime(config: Config) -> Runtime:
    """Everything about the model that is known before anything heavy is loaded.

    Raises:
        ModelError: it isn't here, or a file of it is missing.
        ConfigError: there is no such device.
    """
    folder, _ = choose_model(config.model)
    shape = check_model(config, folder)
    device = choose_device(config.compute.device)
    return Runtime(folder, device, choose_dtype(config.compute.dtype, device), shape)


def load_base(config: Config, runtime: Runtime) -> tuple[nn.Module, ScaleSet, Parametrization]:
    """The 4-bit transformer, its live scales, and the numbers that are trained, all as they are
    before a run.
    """
    transformer = quantized_transformer(config, runtime.folder, runtime.device, runtime.dtype)
    return transformer, *scales_and_numbers(config, transformer)


def check_model(config: Config, folder: Path) -> PipelineShape:
    """Refuse a pipeline that lacks a part or whose parts don't fit, before anything is loaded.

    Raises ModelError.
    """
    place = transformer_place(config, folder)
    elsewhere = ("transformer",) if place != folder / "transformer" else ()
    t5 = ("text_encoder_3", "tokenizer_3") if config.text.t5 == "none" else ()
    sd3.check_model_folder(folder, without=(*elsewhere, *t5))
    shape = read_shape(folder, place, with_t5=not t5)
    check_shape(shape, folder)
    return shape


def shape_of(config: Config, runtime: Runtime) -> PipelineShape:
    """Of the pipeline of a run. Raises ModelError for damaged configs or headers."""
    if runtime.shape is not None:
        return runtime.shape
    return read_shape(runtime.folder, transformer_place(config, runtime.folder))


def transformer_place(config: Config, folder: Path) -> Path:
    """Where the transformer's weights are: in the pipeline, or what `transformer` or a single file
    as `model` names.
    """
    if config.transformer is not None:
        return Path(config.transformer)
    return Path(config.model) if Path(config.model).is_file() else folder / "transformer"


def choose_model(name: str) -> tuple[Path, str]:
    """The pipeline folder that a `--model` means, and a sentence that says which and why.

    Raises:
        ModelError: it isn't here; the message says how to get it.
    """
    if name == "auto":
        return _choose_automatically()
    if name == "tiny":
        return resources.tiny_model(), "model: tiny, the embedded model"
    if Path(name).is_dir():
        return Path(name), f"model: the folder {name}"
    if Path(name).is_file():
        return Path(
            name
        ).resolve().parent, f"model: the single file {name}, with the other parts from its folder"
    cached = _cached_snapshot(name)
    if cached is None:
        raise _not_here(name)
    return cached, f"model: {name} from the local cache"


def download_command(name: str) -> str:
    """Without what the repositories of Stable Diffusion 3 hold twice: one file for other programs,
    and encoders for these.
    """
    twice = (
        " --exclude 'sd3*.safetensors' --exclude 'text_encoders/*'"
        if name.startswith(GATED)
        else ""
    )
    return f"hf download {name}{twice}"


def _not_here(name: str) -> ModelError:
    """Nothing is ever downloaded here; says how to, and what else is missing on this machine for
    it.
    """
    from huggingface_hub import constants, get_token

    place = Path(constants.HF_HUB_CACHE)
    got = [
        f"{name!r} is neither a folder, nor a file, nor a whole model in the local cache {place}"
    ]
    steps = []
    gated = name.startswith(GATED)
    if gated:
        steps.append(f"accept the licence at https://huggingface.co/{name}")
        if get_token() is None:
            got.append("it is gated and no access token is stored here")
            steps.append("`hf auth login`")
    free = free_bytes(place)
    if gated and free < DOWNLOAD:
        got.append(
            f"{free / 1e9:.0f} GB are free where it would go, about {DOWNLOAD / 1e9:.0f} GB "
            "are needed"
        )
        steps.append("free some space, or set HF_HOME to a larger disk")
    steps.append(f"`{download_command(name)}`")
    steps.append(
        "without network: copy the model's folder from another machine and give --model PATH; "
        "or --model tiny"
    )
    return ModelError(
        "; ".join(got),
        "tiny, a pipeline folder, or a Hub id that was downloaded",
        "\n  ".join(["", *steps]),
    )


def _choose_automatically() -> tuple[Path, str]:
    """The large model where its weights are here and fit, at the least; else the embedded one, or
    an error where there is a GPU.
    """
    cached = _cached_snapshot(BIG_MODEL)
    if cached is None:
        if torch.cuda.is_available():
            raise ModelError(
                f"a GPU, but no weights of {BIG_MODEL} in the local cache",
                "downloaded weights, or a model by name",
                f"accept the licence at https://huggingface.co/{BIG_MODEL}, then `hf auth "
                "login` and "
                f"`{download_command(BIG_MODEL)}`; or add --model tiny for the embedded model",
            )
        return (
            resources.tiny_model(),
            f"model: tiny, the embedded model (no GPU and no weights of {BIG_MODEL} here)",
        )
    device = choose_device("auto")
    needed, free = least_memory(cached, device), memory.available_bytes(device)
    if free is not None and needed > free:
        why = (
            f"{BIG_MODEL} is here but needs {needed / 1e9:.1f} GB of memory at the least; "
            f"{free / 1e9:.1f} GB are free"
        )
        return resources.tiny_model(), f"model: tiny, the embedded model ({why})"
    return cached, f"model: {BIG_MODEL}, found in the local cache"


def least_memory(folder: Path, device: torch.device) -> float:
    """Bytes that any run of a model needs. Raises ModelError when its transformer is not whole."""
    found, dtype, quant = (
        find_transformer(folder / "transformer"),
        choose_dtype("auto", device),
        Config().quant,
    )
    size = memory.ModelSize.of(empty_transformer(found.config), quantization(quant), dtype)
    return memory.least_bytes(size, found.entries, dtype, device.type)


def choose_lm(name: str) -> tuple[Path, str]:
    """The folder or GGUF file of a language model that a `--model` means, and a sentence that says
    which.

    Raises:
        ModelError: it isn't here; the message says how to get it.
    """
    if Path(name).is_dir():
        return Path(name), f"model: the folder {name}"
    if is_gguf(Path(name)):
        return Path(name), f"model: the file {name}"
    cached = None if name == "auto" else _cached_snapshot(name, "config.json")
    if cached is None:
        raise ModelError(
            "no language model is named"
            if name == "auto"
            else f"{name!r} is neither a folder nor a model in the local cache",
            "a transformers folder, a GGUF file, or a Hub id that was downloaded",
            "pass --model FOLDER or FILE.gguf; for a model of the Hub: hf download ID "
            "--local-dir FOLDER",
        )
    return cached, f"model: {name} from the local cache"


def _cached_snapshot(name: str, file: str = "model_index.json") -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        index = try_to_load_from_cache(name, file)
    except HFValidationError:
        return None
    return Path(index).parent if isinstance(index, str) else None


def is_tiny(folder: Path) -> bool:
    return folder.resolve() == resources.tiny_model().resolve()


def resolve_sampling_(config: Config, folder: Path) -> None:
    """Fill in the number of steps and the guidance that suit the model where the user gave none."""
    steps, guidance = (16, 2.0) if is_tiny(folder) else (28, 4.5)
    config.sample.steps = config.sample.steps or steps
    if config.sample.guidance is None:
        config.sample.guidance = guidance


def sampler(
    config: Config,
    folder: Path,
    transformer: nn.Module,
    vae: Any,
    prompts: Sequence[Prompt],
    encoded: Mapping[str, sd3.EncodedPrompt],
    device: torch.device,
    dtype: torch.dtype,
) -> Sampler:
    """Square samples of `prompts` at the run's resolution, or at the model's own."""
    resolve_sampling_(config, folder)
    side, settings = config.data.resolution or sd3.native_resolution(folder), config.sample
    return Sampler(
        transformer,
        sd3.load_scheduler(folder),
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
        batch_size=settings.batch_size,
        device=device,
        dtype=dtype,
    )


def prompt_encoder(
    config: Config, folder: Path, device: torch.device, dtype: torch.dtype
) -> sd3.PromptEncoder:
    """Encoders are loaded one after the other, T5 as `text.t5` says; its 4-bit copy is kept for new
    prompts.
    """
    mode = t5_mode(config, folder)

    def load(part: str) -> nn.Module:
        if part != text_encoders.T5 or mode != "nf4":
            return text_encoders.load_text_encoder(folder, part, dtype=dtype, device=device)
        source = Source(
            read_entries(folder / part), lambda: text_encoders.empty_text_encoder(folder, part)
        )
        return text_encoders.ready(
            load_quantized(
                source, Quantization(), dtype=dtype, device=device, cache=copies_folder(config)
            )
        )

    return sd3.PromptEncoder(
        folder,
        tensor_cache(config),
        device=device,
        dtype=dtype,
        t5_tokens=config.text.t5_tokens,
        t5=mode,
        load=load,
    )


def t5_mode(config: Config, folder: Path) -> Literal["nf4", "full", "none"]:
    size = None
    if config.text.t5 == "auto" and text_encoders.has_part(folder, text_encoders.T5):
        size = sum(entry.nbytes for entry in read_entries(folder / text_encoders.T5).values())
    return t5_mode_of(config, size)


def t5_mode_of(config: Config, size: float | None) -> Literal["nf4", "full", "none"]:
    """How T5 is loaded that has `size` bytes on disk; None where there is none."""
    if config.text.t5 != "auto":
        return config.text.t5
    if size is None:
        return "none"
    return "nf4" if size > LARGE_T5 else "full"


def load_vae(config: Config, folder: Path, device: torch.device) -> Any:
    compute = config.compute
    return vae.load_vae(
        folder,
        choose_device(compute.vae_device) if compute.vae_device else device,
        tile=compute.vae_tile,
    )


def tiles(config: Config, samples: Sequence[Sample]) -> str:
    """How images are cut for the VAE, where any is: it changes latents a little, so it belongs to
    their cache key.
    """
    tile = config.compute.vae_tile
    cut = tile is not None and any(max(sample.width, sample.height) > tile for sample in samples)
    return f"/{tile}" if cut else ""


def tensor_cache(config: Config) -> TensorCache:
    return TensorCache(cache_folder(config) / "tensors")


def cache_folder(config: Config | LlmConfig) -> Path:
    return Path(config.data.cache_dir) if config.data.cache_dir else resources.cache_folder()


def quantized_transformer(
    config: Config, folder: Path, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """The 4-bit transformer, ready for tuning and sampling. Raises ModelError."""
    found = find_transformer(transformer_place(config, folder))
    source = Source(found.entries, lambda: empty_transformer(found.config))
    return load_quantized(
        source, quantization(config.quant), dtype=dtype, device=device, cache=copies_folder(config)
    )


def quantization(quant: QuantConfig) -> Quantization:
    return Quantization(
        quant.type, quant.blocksize, tuple(quant.skip), quant.backend, quant.activations
    )


def copies_folder(config: Config | LlmConfig) -> Path:
    """Where 4-bit copies of large models are kept for the next start."""
    return cache_folder(config) / "quantized"


def scales_and_numbers(
    config: RunConfig, transformer: nn.Module, beside: Sequence[WeightHandle] = ()
) -> tuple[ScaleSet, Parametrization]:
    """What is trained: the scales or codes of the chosen layers, and all of the unquantized tensors
    `beside`.

    Raises:
        ConfigError: `qzo.layers` matches no layer.
    """
    level, wanted = config.qzo.parametrization, config.qzo.layers
    scales, grids = (
        find_codes(transformer) if level == "codes" else (find_scales(transformer, beside), {})
    )
    trained = trained_of(scales, wanted)
    token_wise = matching(scales, sd3.TOKEN_WISE_LAYERS) if config.qzo.regions > 1 else []
    if scales.weights.issuperset(trained):
        remedy = "correct qzo.layers, or give null for all layers"
        raise ConfigError(
            f"qzo.layers = {wanted}: no such layer",
            f"parts of names like {next(iter(scales))}",
            remedy,
        )
    if level == "column" and all(
        live.numel() == scales.rows(name) for name, live in scales.tensors().items()
    ):
        raise ConfigError(
            "qzo.parametrization = column on layers with one scale for each output",
            "row, layer or separable, which such a format has numbers for",
            "use qzo.parametrization=separable",
        )
    if level == "codes":
        return scales, Codes(scales, grids, trained, config.qzo.probe)
    return scales, parametrize(
        scales, level, config.qzo.units, trained, token_wise, last_readers(scales)
    )


def trained_of(scales: ScaleSet, wanted: Sequence[str] | None) -> list[str]:
    """Names of the chosen layers and of what is no layer."""
    of_layers = set(chosen([name for name in scales if name not in scales.weights], wanted))
    return [name for name in scales if name in of_layers or name in scales.weights]


def probing(config: RunConfig) -> Probing:
    return Probing(
        seed=config.train.seed,
        eps=config.qzo.eps,
        num_directions=config.qzo.num_directions,
        per_example=config.qzo.per_example,
        distribution=config.qzo.directions,
        clip_threshold=config.qzo.clip_threshold,
        # else by the optimizer, which knows of steps before
        normalize=config.qzo.normalize is True,
        probes_per_forward=probes_at_once(config),
        estimator=config.qzo.estimator,
    )


def probes_of_example(config: RunConfig) -> int:
    """How many forwards of each example a step makes."""
    return config.qzo.num_directions * (1 if config.qzo.estimator == "leave_one_out" else 2)


def step_in_words(config: RunConfig, examples: int, things: str) -> str:
    """What a step of `examples` of these `things` costs."""
    count, probes = config.qzo.num_directions, probes_of_example(config)
    along = (
        f"{count} direction{'s' * (count > 1)} "
        f"{'of each' if config.qzo.per_example else 'that all share'}"
    )
    sides = "" if config.qzo.estimator == "leave_one_out" else ", at both sides"
    at_once = (
        ""
        if config.train.micro_batch_size is None
        else f", {config.train.micro_batch_size} at once"
    )
    return f"{examples} {things}, {along}{sides}: {examples * probes} forwards of one{at_once}"


def probes_at_once(config: RunConfig) -> int:
    """How many probes of an example go into one forward: all of its directions, or both sides of
    one, as far as there is room.
    """
    if not config.qzo.scales_activations:
        return 1
    wanted, every = (
        config.train.micro_batch_size,
        config.qzo.num_directions if config.qzo.estimator == "leave_one_out" else 2,
    )
    return every if wanted is None else min(wanted, every)


def micro_batch_size(config: RunConfig, whole: int) -> int:
    """How many of `whole` examples go into one forward, each in as many copies as
    `probes_at_once`.
    """
    wanted = config.train.micro_batch_size
    return whole if wanted is None else max(1, wanted // probes_at_once(config))


def check_share(batch_size: int, processes: int) -> None:
    """Raises ConfigError when some process would have no example of a batch."""
    if batch_size < processes:
        raise ConfigError(
            f"data.batch_size={batch_size} on {processes} processes",
            "at least one example a process",
            f"use data.batch_size={processes} or more, or fewer processes",
        )


def check_scalars(config: RunConfig, examples: int, patch_groups: int = 1) -> None:
    """Raises ConfigError when a step would have more scalars than a record of the journal has room
    for.
    """
    directions = config.qzo.num_directions * (examples if config.qzo.per_example else 1)
    if directions * patch_groups > MOST_SCALARS:
        raise ConfigError(
            f"{directions} directions a step, {patch_groups} regions each: "
            f"{directions * patch_groups} scalars",
            f"at most {MOST_SCALARS}, which is what a record of the journal holds",
            "lower data.batch_size, qzo.num_directions or qzo.regions",
        )


def optimizer(config: RunConfig) -> Optimizer:
    train = config.train
    if train.optimizer == "feedback":
        return ErrorFeedback(train.feedback_decay, train.feedback_steps)
    return make_optimizer(train.optimizer, in_running_spreads=config.qzo.normalize == "running")


def first_order(model: nn.Module) -> tuple[Adam, TakeStep]:
    """Adam along the exact gradient of the trained scales: what zeroth order is compared with."""

    def gradient(objective: Any, micro_batches: Any, theta: Any) -> dict[str, Tensor]:
        return exact_gradient(objective, micro_batches, theta, handles_of(model))

    return Adam(), first_order_step(gradient)


def schedule(config: RunConfig, rate_factor: float = 1.0) -> Schedule:
    train = config.train
    return make_schedule(
        train.schedule, train.lr * rate_factor, train.max_steps, train.warmup_steps
    )


def fingerprints(model: nn.Module, scales: ScaleSet) -> tuple[str, str]:
    """Hashes of what stays and of what is trained, as they are now: codes and scales, or scales and
    codes.
    """
    return frozen_fingerprint(model, scales), fingerprint(scales.tensors().items())
