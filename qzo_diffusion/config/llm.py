"""Settings of `qzo-diffuse llm`; those that every run has are in `sections`."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from qzo_diffusion.config.defaults import DIRECTIONS, PROBES, TEXTS, Rule
from qzo_diffusion.config.kinds import (
    Count,
    PathInside,
    PathOrName,
    PathText,
    Positive,
    Seed,
    Whole,
)
from qzo_diffusion.config.sections import (
    QuantConfig,
    QzoConfig,
    RunConfig,
    Section,
    check_method,
)

Method = Literal["qzo", "mezo", "quzo", "quzo-lora", "qlora", "fo-scales"]
FIRST_ORDER: tuple[Method, ...] = ("qlora", "fo-scales")


class LlmDataConfig(Section):
    dir: PathOrName | None = None
    """folder of the task's data files, or a dataset's Hub id in the local cache"""
    train_file: PathInside | None = None
    """file in that folder; null: the task's own name. It may be test_file too: examples that are
    drawn are disjoint"""
    test_file: PathInside | None = None
    """file in that folder; null: the task's own name"""
    batch_size: Count = PROBES // DIRECTIONS
    """examples of a step"""
    train_examples: Count | None = 1000
    """drawn from the training file; null: all of it"""
    validation_examples: Whole = 200
    """drawn from those of the training file that are left"""
    test_examples: Whole | None = 1000
    """drawn from the test file; 0: none; null: all of it"""
    split_seed: Seed = 0
    """seed of the drawn examples, the same for every train.seed"""
    cache_dir: PathText | None = None
    """folder of caches; null: the user's own"""
    keep_hidden: bool = True
    """keep on disk the hidden states in front of the first trained block, for each example"""
    max_tokens: Annotated[int, Field(ge=16)] | None = None
    """longer prompts lose their beginning; null: they are an error"""


class LlmQzoConfig(QzoConfig):
    unquantized: Literal["none", "gains", "all"] = "none"
    """trained beside the scales, in absolute units: gains of norms and biases, or embeddings and
    head too (the paper, with AQLM)"""


class LlmQuantConfig(QuantConfig):
    """A folder that is quantized already, in the formats of bitsandbytes, GPTQ or AQLM, stays as it
    is.
    """

    _types_elsewhere: ClassVar[tuple[str, ...]] = ("nf4", "fp4", "int8")
    # tied to the embedding in small models
    skip: list[str] = Field(default_factory=lambda: ["lm_head"])
    """layers that stay as they are, by parts of their names"""
    transform: Literal["none", "hadamard", "kurtail", "flatquant"] = "none"
    """map of the layers' inputs that spreads large ones before anything is quantized; hadamard: a
    fixed rotation; kurtail: learned rotations; flatquant: learned invertible maps"""
    calibration: PathText | None = None
    """text file that kurtail and flatquant learn from, in UTF-8"""

    @model_validator(mode="after")
    def _transforms_what_is_read(self) -> "LlmQuantConfig":
        if self.transform != "none" and self.backend == "bnb" and self.type == "int8":
            raise ValueError("transform: none, or backend: intgrid with type: int8")
        if self.transform in ("kurtail", "flatquant") and self.calibration is None:
            raise ValueError(
                f"calibration: a text file to learn from, for transform {self.transform}"
            )
        return self


class LoraConfig(Section):
    rank: Count = 8
    """of adapters, methods qlora and quzo-lora"""
    alpha: Positive = 16.0
    """adapters are multiplied by alpha / rank"""


class LlmConfig(RunConfig):
    """Settings of a run on a language model."""

    table: ClassVar[Sequence[Rule]] = TEXTS

    task: PathInside = "sst2"
    """a task that comes along, or a task file"""
    method: Method = "qzo"
    """qzo, mezo, quzo and quzo-lora: forward passes alone; qlora and fo-scales: by gradients"""
    objective: Literal["loss", "accuracy", "f1"] = "loss"
    """figure that is tuned for"""
    data: LlmDataConfig = LlmDataConfig()
    qzo: LlmQzoConfig = LlmQzoConfig()
    quant: LlmQuantConfig = LlmQuantConfig()
    lora: LoraConfig = LoraConfig()

    @model_validator(mode="after")
    def _one_loss_for_an_answer(self) -> "LlmConfig":
        if self.method in FIRST_ORDER and self.objective != "loss":
            raise ValueError(
                f"objective: loss for method {self.method}; accuracy and f1 have no gradient"
            )
        return self

    @model_validator(mode="after")
    def _by_one_method(self) -> "LlmConfig":
        check_method(self.method, self)
        if self.method in ("mezo", "quzo-lora") and (
            self.qzo.units != "absolute" or self.qzo.parametrization != "dense"
        ):
            raise ValueError(
                f"qzo.units: absolute and qzo.parametrization: dense for method {self.method}, "
                "which trains no scales"
            )
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> "LlmConfig":
        # which has dense numbers alone
        in_absolute_units = self.qzo.units == "absolute" and self.method == "qzo"
        if self.qzo.unquantized != "none" and not in_absolute_units:
            raise ValueError(
                "qzo.unquantized: none, or qzo.units: absolute and qzo.parametrization: dense "
                "with method: qzo"
            )
        if self.method == "qlora" and (self.quant.backend != "bnb" or self.quant.type == "int8"):
            raise ValueError("quant.backend: bnb and quant.type: nf4 or fp4 for method qlora")
        if self.quant.transform != "none" and self.method not in ("qzo", "quzo", "fo-scales"):
            raise ValueError("quant.transform: none, or method: qzo, quzo or fo-scales")
        if self.qzo.subspace is not None:
            raise ValueError("qzo.subspace: null for language models, where none was tried")
        if self.qzo.regions > 1:
            raise ValueError("qzo.regions: 1 for language models; an example's answer has one loss")
        return self
