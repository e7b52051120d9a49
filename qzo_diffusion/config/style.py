"""Settings of `qzo-diffuse train`: a style, from a folder of images."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qzo_diffusion.config.defaults import (
    DIRECTIONS,
    FIRST_ORDER_SCALES,
    PROBES,
    estimate_settings,
    filled_in,
    suited_to_quzo,
)
from qzo_diffusion.config.sections import (
    Count,
    NotNegative,
    Positive,
    RunConfig,
    Section,
    check_method,
)


class DataConfig(Section):
    style_dir: str | None = None
    validation_dir: str | None = None
    caption: str | None = None
    trigger: str | None = None
    resolution: Annotated[int, Field(ge=16, multiple_of=16)] | None = None  # None: the model's own
    # not given, 16 where examples have no several directions of their own
    batch_size: Count = PROBES // DIRECTIONS
    repeats: Count = 1
    flip: bool = False
    caption_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    strict: bool = False
    cache_dir: str | None = None  # None: the user's cache folder


class SigmaConfig(Section):
    distribution: Literal["uniform", "logit_normal"] = "uniform"
    shift: Positive = 1.0


class SampleConfig(Section):
    prompts: str | None = None  # a file; None: the shipped grid prompts
    every: Annotated[int, Field(ge=0)] = 100  # 0: only at the start and the end
    steps: Count | None = None  # None: what suits the model, 28 for Stable Diffusion 3.5
    guidance: NotNegative | None = None  # None: what suits the model, 4.5 for Stable Diffusion 3.5
    negative_prompt: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    batch_size: Count = 8


class TextConfig(Section):
    # T5 is larger than the 4-bit transformer. auto: in NF4 where its files are beyond 2 GB; none:
    # zeros in its place
    t5: Literal["auto", "nf4", "full", "none"] = "auto"
    # None: the tokenizer's own limit, at most 256 as in the SD3 pipeline
    t5_tokens: Count | None = None


StyleMethod = Literal["qzo", "quzo", "fo-scales"]


class Config(RunConfig):
    """Of a style run."""

    method: StyleMethod = "qzo"
    # another one than the model's own: a folder, or a single file in the original layout
    transformer: str | None = None
    # a run, one of its checkpoints or a delta, whose scales this one begins with
    init_from: str | None = None
    data: DataConfig = DataConfig()
    sigma: SigmaConfig = SigmaConfig()
    sample: SampleConfig = SampleConfig()
    text: TextConfig = TextConfig()

    @model_validator(mode="after")
    def _by_one_method(self) -> "Config":
        check_method(self.method, self)
        return self

    @model_validator(mode="before")
    @classmethod
    def _divide_pictures(cls, given: Any) -> Any:
        """Into 16 regions, where examples have directions of their own. Their rate falls like 1 /
        √steps, and is calibrated where nobody chose it."""
        if isinstance(given, dict):
            suited = {
                "quzo": suited_to_quzo(given.get("quant", {})),
                "fo-scales": FIRST_ORDER_SCALES,
            }
            given = filled_in(given, suited.get(str(given.get("method")), {}))
        qzo = given.get("qzo", {}) if isinstance(given, dict) else None
        if not isinstance(qzo, dict):
            return given
        suited = estimate_settings(qzo)
        each = suited["per_example"] and given.get("method", "qzo") == "qzo"
        given = given | {"qzo": {"regions": 16 if each else 1} | qzo}
        train = given.get("train", {})
        usual = (
            each and suited["normalize"] and qzo.get("parametrization", "separable") == "separable"
        )
        if isinstance(train, dict) and usual:
            given["train"] = (
                {"schedule": "inverse_sqrt"}
                | ({} if "lr" in train else {"calibrate_lr": True})
                | train
            )
        return given
