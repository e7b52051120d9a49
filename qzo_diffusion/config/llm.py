"""Settings of `qzo-diffuse llm`; those that every run has are in `config`."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from qzo_diffusion.config.defaults import (
    DIRECTIONS,
    FIRST_ORDER_SCALES,
    PROBES,
    estimate_settings,
    filled_in,
    rate_for,
    suited_to_quzo,
)
from qzo_diffusion.config.sections import (
    Count,
    Positive,
    QuantConfig,
    QzoConfig,
    RunConfig,
    Section,
    check_method,
)

Method = Literal["qzo", "mezo", "quzo", "quzo-lora", "qlora", "fo-scales"]

# What suits a method where nothing is said. QZO's rates were found on SmolLM2 and SST-2
# (docs/decisions/rates.md D25), MeZO's and QLoRA's are those of their papers; first-order on the
# scales takes the rate that the convergence benchmark found for styles.
DEFAULTS: dict[Method, dict[str, Any]] = {
    "qzo": {},
    "mezo": {
        "train.lr": 1e-6,
        "train.schedule": "constant",
        "qzo.parametrization": "dense",
        "qzo.units": "absolute",
        "qzo.eps": 1e-3,
        "qzo.directions": "gaussian",
    },
    "quzo": {},
    # QuZO's second mode: adapters beside a base on an integer grid, by forwards alone; radius and
    # rate of MeZO's LoRA runs.
    "quzo-lora": {
        "train.lr": 1e-4,
        "train.schedule": "constant",
        "quant.backend": "intgrid",
        "quant.type": "int8",
        "qzo.parametrization": "dense",
        "qzo.units": "absolute",
        "qzo.eps": 1e-2,
    },
    "qlora": {"train.lr": 2e-4, "train.schedule": "linear", "qzo.parametrization": "dense"},
    "fo-scales": FIRST_ORDER_SCALES,
}
# QZO trains the layers that have the least noise for their signal
# (docs/decisions/language_models.md D42). Probes of them change the loss less, so that in bfloat16
# they need a larger radius.
MIDDLE_BLOCKS: dict[str, Any] = {"qzo.layers": "quiet", "qzo.eps": 3e-2}
# QZO's normalised rate for styles, over those for these layers and for all
PICTURES_OVER_QUIET, PICTURES_OVER_ALL = 2, 5
PLAIN_LR = 1e-3  # of QZO's steps that are not normalised
FIRST_ORDER: tuple[Method, ...] = ("qlora", "fo-scales")


class LlmDataConfig(Section):
    dir: str | None = None  # folder of the task's files
    # None: the task's own names. The same file for both: what is drawn is disjoint
    train_file: str | None = None
    test_file: str | None = None
    # not given, 16 where examples have no several directions of their own
    batch_size: Count = PROBES // DIRECTIONS
    train_examples: Count | None = 1000  # drawn from the training file; None: all of it
    validation_examples: Annotated[int, Field(ge=0)] = 200  # drawn from what is left of it
    # drawn from the test file; 0: none, None: all of it
    test_examples: Annotated[int, Field(ge=0)] | None = 1000
    # the same examples for every seed of a run
    split_seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    # on disk: what the blocks before the first trained one give for each training example
    keep_hidden: bool = True
    # longer prompts lose their beginning; None: they are an error
    max_tokens: Annotated[int, Field(ge=16)] | None = None


class LlmQzoConfig(QzoConfig):
    # Trained beside the scales, in absolute units: gains of norms and biases, or embeddings and
    # head too (the paper, with AQLM)
    unquantized: Literal["none", "gains", "all"] = "none"


class LlmQuantConfig(QuantConfig):
    """A folder that is quantized already, in the formats of bitsandbytes, GPTQ or AQLM, stays as it
    is.
    """

    _types_elsewhere: ClassVar[tuple[str, ...]] = ("nf4", "fp4", "int8")
    # tied to the embedding in small models
    skip: list[str] = Field(default_factory=lambda: ["lm_head"])


class LoraConfig(Section):
    rank: Count = 8
    alpha: Positive = 16.0


class LlmConfig(RunConfig):
    """Of a run on a language model."""

    task: str = "sst2"
    method: Method = "qzo"
    objective: Literal["loss", "accuracy", "f1"] = "loss"
    data: LlmDataConfig = LlmDataConfig()
    qzo: LlmQzoConfig = LlmQzoConfig()
    quant: LlmQuantConfig = LlmQuantConfig()
    lora: LoraConfig = LoraConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, settings: Any) -> Any:
        """What suits the method, where the settings say nothing."""
        if not isinstance(settings, dict):
            return settings
        method, qzo, train = (settings.get(name, {}) for name in ("method", "qzo", "train"))
        suited = dict(
            next((values for name, values in DEFAULTS.items() if name == (method or "qzo")), {})
        )
        if (method or "qzo") == "qzo" and isinstance(qzo, dict) and isinstance(train, dict):
            quiet = estimate_settings(qzo)["normalize"] and qzo.get("layers", "quiet") == "quiet"
            suited |= MIDDLE_BLOCKS if quiet else {}
            suited["train.lr"] = rate_for(
                qzo, train, PICTURES_OVER_QUIET if quiet else PICTURES_OVER_ALL, PLAIN_LR
            )
        if method == "quzo":
            suited = suited_to_quzo(settings.get("quant", {}))
        return filled_in(settings, suited)

    @model_validator(mode="after")
    def _fits_together(self) -> "LlmConfig":
        if self.method in FIRST_ORDER and self.objective != "loss":
            raise ValueError(
                f"objective: loss for method {self.method}; accuracy and f1 have no gradient"
            )
        check_method(self.method, self)
        if self.method in ("mezo", "quzo-lora") and (
            self.qzo.units != "absolute" or self.qzo.parametrization != "dense"
        ):
            raise ValueError(
                f"qzo.units: absolute and qzo.parametrization: dense for method {self.method}, "
                "which trains no scales"
            )
        # which has dense numbers alone
        in_absolute_units = self.qzo.units == "absolute" and self.method == "qzo"
        if self.qzo.unquantized != "none" and not in_absolute_units:
            raise ValueError(
                "qzo.unquantized: none, or qzo.units: absolute and qzo.parametrization: dense "
                "with method: qzo"
            )
        if self.method == "qlora" and (self.quant.backend != "bnb" or self.quant.type == "int8"):
            raise ValueError("quant.backend: bnb and quant.type: nf4 or fp4 for method qlora")
        if self.qzo.regions > 1:
            raise ValueError("qzo.regions: 1 for language models; an example's answer has one loss")
        return self
