"""Everything that the rest of the program asks of a family of picture models.

A family is one record, made in a file of its own here. Nothing outside `families` names a family:
`families.registry` finds the one that a model belongs to.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from qzo_diffusion.diffusion.autoencoders import PLAIN
from qzo_diffusion.diffusion.encoded_prompt import EncodedPrompt
from qzo_diffusion.diffusion.flow_matching import Batch, denoising_loss
from qzo_diffusion.diffusion.objectives import Objective
from qzo_diffusion.diffusion.text_encoders import EncoderKind
from qzo_diffusion.quant.choose import matching
from qzo_diffusion.quant.entries import Entry
from qzo_diffusion.quant.weights import Pending

Config = Mapping[str, Any]


class Encoders(Protocol):
    """The text encoders of a pipeline's folder, which are loaded one after the other."""

    t5: str
    """how the large encoder is loaded; "none": it is left out"""
    t5_tokens: int | None
    """the most tokens of the large encoder; None is the tokenizer's own limit"""
    dtype: torch.dtype

    def tokenizer(self, part: str) -> Any:
        """Load the tokenizer of a part."""
        ...

    def run(self, part: str, work: Callable[[Any, Any], Any]) -> Any:
        """Load the encoder of a part, return `work(encoder, tokenizer)`, and free the encoder."""
        ...

    def setting(self, name: str, default: Any) -> Any:
        """Return a setting of model_index.json."""
        ...

    def width(self, places: Sequence[tuple[str, str]], default: int) -> int:
        """Return the first setting that is there, of (part, setting) pairs."""
        ...


def large_tokenizer(encoders: Encoders, part: str, most: int) -> tuple[Any, int]:
    """Return the tokenizer of the large encoder, and how many tokens of a prompt are read.

    Args:
        most: tokens that the family's own pipeline reads.
    """
    tokenizer = encoders.tokenizer(part)
    return tokenizer, encoders.t5_tokens or min(most, tokenizer.model_max_length)


class Layout(Protocol):
    """The names that a family has in single files and in other programs."""

    def are_of_diffusers(self, names: Iterable[str]) -> bool:
        """Return whether the names of a file are diffusers' own."""
        ...

    def is_original(self, names: Iterable[str]) -> bool:
        """Return whether a file holds a denoiser of this family under these names."""
        ...

    def whole_shapes(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """Return the entries of a GGUF file in the shapes that the layout has."""
        ...

    def config_of(self, entries: Mapping[str, Entry]) -> dict[str, Any]:
        """Infer diffusers' config from the shapes of a file. Raises ModelError."""
        ...

    def to_diffusers(self, entries: Mapping[str, Entry], config: Config) -> dict[str, Entry]:
        """Return the same bytes under diffusers' names. Raises ModelError."""
        ...

    def to_original(self, tensors: Mapping[str, Pending], config: Config) -> dict[str, Pending]:
        """Return diffusers' tensors under the original names."""
        ...


class Call(Protocol):
    """A call of a denoiser."""

    def __call__(
        self,
        denoiser: Any,
        noisy: Tensor,
        time: Tensor,
        prompts: tuple[Tensor, Tensor],
        dtype: torch.dtype,
        guidance: float | None = None,
    ) -> Tensor:
        """Return the prediction, [B, C, h, w] fp32.

        Args:
            noisy: [B, C, h, w], scaled as in training.
            time: [B], as the scheduler counts it.
            prompts: embeds [B, T, D] and pooled [B, P].
            dtype: that the denoiser runs in.
            guidance: of a model that has it as an input; None is that of training.
        """
        ...


@dataclass(frozen=True)
class Shape:
    """Sizes of a denoiser, for planning memory.

    width: of the hidden states. latents: along a side of one token. text_width: of prompt
    embeddings. channels: of latents.
    """

    width: int
    latents: int
    text_width: int
    channels: int


@dataclass(frozen=True)
class Denoiser:
    """The model that is tuned.

    part: its folder in a pipeline. class_name: in diffusers. skip: layers that stay unquantized, by
    parts of their names. token_wise: layers that change mostly the loss of their own patch, by
    parts of their names; `joint` layers, by the beginning of their names, are none of them. Keys
    and values never are. sample_size: side in latents where a config does not say it. shape: reads
    the sizes from a config. level: the
    noise level in [0, 1] of a call that a pipeline makes, from the call's keyword arguments.
    layout: the names in single files, if there is one. owns: tells the family's models from others
    of the class. fill: computes what no file holds of a model that was built without memory.
    """

    part: str
    class_name: str
    skip: tuple[str, ...]
    token_wise: tuple[str, ...]
    sample_size: int
    shape: Callable[[Config], Shape]
    call: Call
    level: Callable[[Mapping[str, Any]], float]
    layout: Layout | None = None
    joint: tuple[str, ...] = ()
    owns: Callable[[Config], bool] = lambda config: True
    fill: Callable[[Any], None] = lambda model: None

    def predict(self, denoiser: Any, batch: Batch, dtype: torch.dtype) -> Tensor:
        """Return the prediction for a batch's noisy inputs, [B, C, h, w] fp32."""
        time = batch.objective.time(batch.sigma)
        return self.call(denoiser, batch.noisy, time, (batch.prompt_embeds, batch.pooled), dtype)

    def own_patch(self, names: Iterable[str]) -> list[str]:
        """Return the layers that change mostly the loss of their own patch."""
        found = matching(names, self.token_wise)
        return [name for name in found if not name.startswith(self.joint)] if self.joint else found


@dataclass(frozen=True)
class Texts:
    """The text encoders.

    classes: part of a pipeline -> class in transformers, or a language model, in the order in which
    they run. large: the part that `text.t5` loads, T5 or a language model, if there is one.
    large_optional: zeros may stand in its place. large_tokens: the most that the pipeline reads.
    clip_tokens: of prompt embeddings, beside those of the large encoder. encode: returns `embeds`,
    `pooled` and `tokens` (counted, and the limit) of each prompt. widths: (thing, given, wanted)
    for each width that an encoder gives to the denoiser, from the denoiser's config and those of
    the encoders.
    """

    classes: Mapping[str, EncoderKind]
    encode: Callable[[Encoders, Sequence[str]], list[dict[str, Tensor]]]
    widths: Callable[[Config, Mapping[str, Config]], list[tuple[str, Any, Any]]]
    clip_tokens: int = 77
    large: str | None = None
    large_optional: bool = False
    large_tokens: int = 0

    def tokens(self, of_large: int | None) -> int:
        """Return the number of tokens of a prompt, with so many of the large encoder."""
        return self.clip_tokens + ((of_large or self.large_tokens) if self.large else 0)

    def of_part(self, encoder: str) -> tuple[str, str]:
        """Return the folders of an encoder and of its tokenizer."""
        return encoder, encoder.replace("text_encoder", "tokenizer")

    def parts(self) -> list[str]:
        """Return the folders of all encoders and tokenizers."""
        return [name for part in self.classes for name in self.of_part(part)]


def guided(without: Tensor, with_prompt: Tensor, scale: float) -> Tensor:
    """Return the prediction of classifier-free guidance, [B, C, h, w]."""
    return without + scale * (with_prompt - without)


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn.

    pipelines: diffusers' classes in model_index.json; the first draws. schedulers: classes that
    serve. steps, guidance: where nothing is set. pipeline: makes diffusers' pipeline of a denoiser,
    a scheduler and a VAE, without encoders. arguments: its keyword arguments for prompts and their
    negatives. unpacked: turns what it returns into latents [B, C, h, w] of a height and a width in
    pixels. shift: the scheduler's time shift of a picture with so many tokens. set_times:
    sets a scheduler's steps for a picture, given their count and the number of tokens. twice:
    guidance takes two passes of the denoiser. unguided: guidance up to this is none; the difference
    that two passes make counts `guidance + 1 - unguided` times. guided: puts two passes together.
    guidance_argument: of the pipeline. of_distilled: steps and guidance of a model that was
    distilled to few steps.
    """

    pipelines: tuple[str, ...]
    schedulers: tuple[str, ...]
    steps: int
    guidance: float
    pipeline: Callable[[Any, Any, Any], Any]
    arguments: Callable[[Sequence[EncodedPrompt], Sequence[EncodedPrompt]], dict[str, Any]]
    shift: Callable[[Any, int], float]
    set_times: Callable[[Any, int, int, torch.device], None]
    unpacked: Callable[[Any, Tensor, int, int], Tensor] = lambda pipeline, latents, *size: latents
    twice: bool = True
    unguided: float = 1.0
    guided: Callable[[Tensor, Tensor, float], Tensor] = guided
    guidance_argument: str = "guidance_scale"
    of_distilled: tuple[int, float] | None = None

    def passes(self, guidance: float | None) -> int:
        """Return the denoiser's passes for a prediction; None is the family's own guidance."""
        given = self.guidance if guidance is None else guidance
        return 2 if self.twice and given > self.unguided else 1


@dataclass(frozen=True)
class Published:
    """The shape of a published model: configs of its denoiser, its VAE and its encoders, and other
    settings of its model_index.json.
    """

    denoiser: Config
    vae: Config
    encoders: Mapping[str, Config]
    index: Config = field(default_factory=dict)


@dataclass(frozen=True)
class Hub:
    """Facts for downloads. ids: a pattern of Hub ids in lower case. gated: the beginnings of ids
    whose licence must be accepted. twice: patterns of files that repositories hold twice. nbytes:
    of the largest model with all its parts.
    """

    ids: str
    gated: tuple[str, ...] = ()
    twice: tuple[str, ...] = ()
    nbytes: float = 30e9


@dataclass(frozen=True, eq=False)
class Family:
    """One family of picture models.

    name: for `--family`. title: in words. vae_factors: settings of a VAE that latents need.
    objective: of a scheduler. hub: for downloads. architecture: reads the name in the list of
    modelspec from a denoiser's config. source: where the original layout was published. gguf: its
    architectures in GGUF files. gguf_kept: how the original names begin of tensors that
    ComfyUI-GGUF's tools never quantize. published: models by Hub id. vae: its class in diffusers.
    distilled: whether a model was distilled to few steps, from its denoiser's config and its
    model_index.json.
    """

    name: str
    title: str
    denoiser: Denoiser
    texts: Texts
    sampling: Sampling
    vae_factors: tuple[str, ...]
    objective: Callable[[Any], Objective]
    hub: Hub
    architecture: Callable[[Config], str]
    source: str
    gguf: tuple[str, ...] = ()
    gguf_kept: tuple[str, ...] = ()
    published: Mapping[str, Published] = field(default_factory=dict)
    vae: str = PLAIN
    distilled: Callable[[Config, Config], bool] = lambda denoiser, index: False

    @property
    def needed(self) -> list[str]:
        """The parts that a pipeline's folder must have."""
        optional = self.texts.large if self.texts.large_optional else None
        encoders = [part for part in self.texts.classes if part != optional]
        texts = [name for part in encoders for name in self.texts.of_part(part)]
        return [self.denoiser.part, "vae", "scheduler", *texts]

    @property
    def weighty(self) -> list[str]:
        """The parts that hold weights."""
        return [self.denoiser.part, "vae", *self.texts.classes]


def model_loss(family: Family, denoiser: Any, batch: Batch, dtype: torch.dtype) -> Tensor:
    """Compute the loss of each example [B] fp32, or of each patch group [B, R].

    Args:
        dtype: that the denoiser runs in; noising and squared error are fp32.
    """
    return denoising_loss(family.denoiser.predict(denoiser, batch, dtype), batch)
