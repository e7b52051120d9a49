"""A run's settings: strict, typed, every one with a default. Values come from a YAML file, then
from flags and `key=value`.

Configs stop at `build.py`; below it everything takes plain arguments. A setting is described once,
here."""

import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qzo_diffusion.core.errors import ConfigError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


GRID_TYPES = ("int8", "int4", "fp8")
SHARED = ("dense", "codes")  # numbers that have one direction for all examples
PLAIN_LR = 3e-3  # of steps that are not normalised; they depend on the loss, so no rate suits all
PROBES = 32  # forwards of one example that a step makes where nothing is said
DIRECTIONS = 8  # of them for each example


def suited_lr(max_steps: int, estimator: str = "leave_one_out", schedule: str = "cosine") -> float:
    """The rate of normalised steps: 0.08 for 500 of them (antithetic 0.05), and like 1 / √steps, at
    most twice as much.

    What the directions' randomness leaves in a number grows like lr · √steps, and that is what a
    rate must keep small. Of 32 probes 28 count as directions with leave_one_out, and 16 with
    antithetic ones. The schedule inverse_sqrt falls by itself: it begins with 0.1 (0.0625), however
    many steps there are."""
    of_500_steps = 0.08 if estimator == "leave_one_out" else 0.05
    if schedule == "inverse_sqrt":
        return 1.25 * of_500_steps
    return of_500_steps * min(2.0, math.sqrt(500 / max(1, max_steps)))


def suited_batch_size(qzo: Mapping[str, Any]) -> int:
    """Few examples where each is probed along several directions, so that a step has the same
    number of forwards.
    """
    suited = estimate_settings(qzo)
    if (
        suited["estimator"] != "leave_one_out"
        or not suited["per_example"]
        or not isinstance(suited["num_directions"], int)
    ):
        return PROBES // 2
    return max(1, PROBES // max(1, suited["num_directions"]))


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


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


class TrainConfig(Section):
    max_steps: Annotated[int, Field(ge=0)] = 1000
    # Not given, it follows from schedule and max_steps; how far a step moves where qzo.normalize is
    # on
    lr: Positive = suited_lr(1000)
    # Before the first step: lower lr where the loss curves much for its slope. True for pictures
    # where lr is not given
    calibrate_lr: bool = False
    # not given, pictures take inverse_sqrt
    schedule: Literal["constant", "linear", "cosine", "hold", "inverse_sqrt"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    # feedback: of integer codes, see core/quzo.py
    optimizer: Literal["sgd", "momentum", "adam", "feedback"] = "sgd"
    feedback_decay: Annotated[float, Field(ge=0, lt=1)] = 0.95
    feedback_steps: Count = 40  # what rounding left is computed again from so many steps
    # probes of examples in one forward; None: pictures what fits and is fast, texts all
    micro_batch_size: Count | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    validate_every: Annotated[int, Field(ge=0)] = 100  # 0: only at the start and the end
    # 0: only when stopped; the journal alone can rebuild a run
    checkpoint_every: Annotated[int, Field(ge=0)] = 100
    keep_checkpoints: Count = 3  # besides the best


def estimate_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The given settings of section `qzo`, with what suits them where nothing was given."""
    each = given.get("per_example", given.get("parametrization") not in SHARED)
    directions = given.get(
        "num_directions", DIRECTIONS if each and given.get("estimator") != "antithetic" else 1
    )
    estimator = "leave_one_out" if each and directions != 1 else "antithetic"
    return {
        "per_example": each,
        "num_directions": directions,
        "estimator": estimator,
        "normalize": each,
        **given,
    }


def rate_for(
    qzo: Mapping[str, Any], train: Mapping[str, Any], divisor: float = 1, plain: float = PLAIN_LR
) -> float:
    """The rate that suits how the given settings scale the estimate: `suited_lr` over `divisor`, or
    `plain` without normalising.
    """
    suited = estimate_settings(qzo)
    if not suited["normalize"]:
        return plain
    try:
        # a flag's value is text until the settings are checked
        steps = int(train.get("max_steps", 1000))
    except (TypeError, ValueError, OverflowError):
        return plain  # and what is no number at all is refused then
    return suited_lr(steps, suited["estimator"], train.get("schedule", "cosine")) / divisor


class QzoConfig(Section):
    """What is not given follows from what is: dense numbers have no directions of each example."""

    # codes: of method quzo
    parametrization: Literal["dense", "row", "layer", "column", "separable", "codes"] = "separable"
    # Parts of layer names, such as ff.net; quiet: see quant.choose; None: every quantized layer
    layers: list[str] | Literal["quiet"] | None = None
    units: Literal["relative", "absolute"] = "relative"
    eps: Positive = 1e-2
    num_directions: Count = DIRECTIONS  # of each example, or of all together
    # leave_one_out: one forward for a direction, beside the mean of the example's others;
    # antithetic: two, at +eps and -eps
    estimator: Literal["antithetic", "leave_one_out"] = "leave_one_out"
    # directions of its own for every example of the batch; not for dense numbers
    per_example: bool = True
    # of an example's picture, with directions of their own in pointwise layers
    regions: Annotated[int, Field(ge=1, le=1024)] = 1
    # Divide derivatives by their spread, so that lr does not depend on the loss: by that of the
    # step, or of the last ten or so
    normalize: bool | Literal["running"] = True
    directions: Literal["rademacher", "gaussian"] = "rademacher"
    # of integer codes: rounded to the grid, or as they are
    probe: Literal["codes", "float"] = "codes"
    clip_threshold: Positive | None = None  # DDC; None: no clipping

    @model_validator(mode="before")
    @classmethod
    def _follow(cls, given: Any) -> Any:
        return estimate_settings(given) if isinstance(given, dict) else given

    @property
    def scales_activations(self) -> bool:
        """Whether numbers are factors of inputs and outputs, which examples can have of their
        own.
        """
        return self.parametrization not in SHARED

    @model_validator(mode="after")
    def _absolute_needs_dense(self) -> "QzoConfig":
        if self.units == "absolute" and self.parametrization != "dense":
            raise ValueError("units: absolute needs parametrization: dense")
        if self.per_example and not self.scales_activations:
            raise ValueError("per_example: true needs a parametrization other than dense or codes")
        if self.estimator == "leave_one_out" and self.num_directions == 1:
            raise ValueError(
                "estimator: leave_one_out needs num_directions: 2 or more; of one direction there "
                "are no others"
            )
        if self.regions > 1 and not self.per_example:
            raise ValueError("regions above 1 need per_example: true")
        if self.normalize is True and not self.per_example and self.num_directions == 1:
            raise ValueError(
                "normalize: true needs per_example: true or several directions; of one only the "
                "sign would be left"
            )
        return self


class SigmaConfig(Section):
    distribution: Literal["uniform", "logit_normal"] = "uniform"
    shift: Positive = 1.0


class QuantConfig(Section):
    type: Literal["nf4", "fp4", "int8", "int4", "fp8"] = "nf4"
    blocksize: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    backend: Literal["bnb", "reference", "intgrid"] = "bnb"
    # int8: inputs are rounded with a scale for each token; intgrid only
    activations: Literal["float", "int8"] = "float"
    _types_elsewhere: ClassVar[tuple[str, ...]] = ("nf4", "fp4")
    # Input, output and embedding layers of an SD3 transformer: 0.5 % of the weights, and the ones
    # that hurt when quantized.
    skip: list[str] = Field(
        default_factory=lambda: [
            "pos_embed",
            "time_text_embed",
            "context_embedder",
            "norm_out",
            "proj_out",
        ]
    )

    @model_validator(mode="after")
    def _of_one_backend(self) -> "QuantConfig":
        if self.backend == "intgrid" and self.type not in GRID_TYPES:
            raise ValueError(f"type: {', '.join(GRID_TYPES)} with backend: intgrid")
        if self.backend != "intgrid" and self.type not in self._types_elsewhere:
            raise ValueError(
                f"type: {', '.join(self._types_elsewhere)} with backend: {self.backend}"
            )
        if self.activations != "float" and self.backend != "intgrid":
            raise ValueError("activations: float, or backend: intgrid")
        return self


class ComputeConfig(Section):
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    vae_device: str | None = None  # None: the same; cpu spares the memory of a small card
    # pixels; larger images go through the VAE in such squares
    vae_tile: Annotated[int, Field(ge=64, multiple_of=8)] | None = 512
    # seconds that a process waits for the others; the first one also samples and validates
    rank_timeout: Positive = 1800.0


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


class RunConfig(Section):
    """What every run has, whatever it trains."""

    model: str = "auto"
    train: TrainConfig = TrainConfig()
    qzo: QzoConfig = QzoConfig()
    quant: QuantConfig = QuantConfig()
    compute: ComputeConfig = ComputeConfig()

    @model_validator(mode="before")
    @classmethod
    def _follow(cls, given: Any) -> Any:
        """The rate that suits how the estimate is scaled, where none is given."""
        qzo, train = (
            (given.get(section, {}) for section in ("qzo", "train"))
            if isinstance(given, dict)
            else (None, None)
        )
        if not isinstance(qzo, dict) or not isinstance(train, dict):
            return given
        filled = given | {"train": {"lr": rate_for(qzo, train)} | train}
        data = given.get("data", {})
        if "data" in cls.model_fields and isinstance(data, dict):
            size = suited_batch_size(qzo) if given.get("method", "qzo") == "qzo" else PROBES // 2
            filled["data"] = {"batch_size": size} | data
        return filled

    @model_validator(mode="after")
    def _calibrated_in_its_own_unit(self) -> "RunConfig":
        if self.train.calibrate_lr and not (self.qzo.normalize and self.qzo.per_example):
            raise ValueError(
                "train.calibrate_lr: false, or qzo.normalize: true with qzo.per_example: true"
            )
        return self

    @model_validator(mode="after")
    def _codes_are_on_a_grid(self) -> "RunConfig":
        codes = self.qzo.parametrization == "codes"
        if codes and self.quant.backend != "intgrid":
            raise ValueError("qzo.parametrization: codes needs quant.backend: intgrid")
        if codes and self.train.optimizer not in ("sgd", "feedback"):
            raise ValueError(
                "train.optimizer: sgd or feedback for codes, which move in whole steps"
            )
        if self.train.optimizer == "feedback" and not codes:
            raise ValueError("train.optimizer: feedback is for qzo.parametrization: codes")
        if self.qzo.probe == "float" and (not codes or self.quant.type == "fp8"):
            raise ValueError("qzo.probe: codes, or int8 or int4 codes that are trained")
        return self

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


StyleMethod = Literal["qzo", "quzo", "fo-scales"]

# What suits training of codes where nothing is said, in pictures and texts alike
# (docs/decisions.md).
QUZO: dict[str, Any] = {
    "qzo.parametrization": "codes",
    "quant.backend": "intgrid",
    "quant.type": "int8",
    "train.optimizer": "feedback",
    "train.lr": 0.2,  # codes that a typical step moves each number
    # a constant rate ends in noise; under a cosine nothing reaches a code any more half way
    "train.schedule": "linear",
}
# A code is 3 % of a typical weight in int8, 40 % in int4 and 6 to 12 % in fp8; rounded probes of
# int4 would drown everything.
QUZO_PROBES: dict[str, dict[str, Any]] = {
    "int8": {"qzo.eps": 1.0},
    "int4": {"qzo.eps": 0.1, "qzo.probe": "float", "train.lr": 0.05},
    "fp8": {"qzo.eps": 0.25, "train.lr": 0.15},
}


def suited_to_quzo(quant: Any) -> dict[str, Any]:
    """What suits codes of the given section `quant`."""
    kind = quant.get("type", "int8") if isinstance(quant, dict) else "int8"
    return QUZO | QUZO_PROBES.get(str(kind), {})


# First-order on the scales: the rate that the convergence benchmark found for styles.
FIRST_ORDER_SCALES: dict[str, Any] = {"train.lr": 1e-3, "qzo.parametrization": "dense"}


def filled_in(settings: Mapping[str, Any], suited: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with those of the dotted `suited` ones that they do not give; sections that are no
    mapping stay as they are.
    """
    filled = {
        key: dict(value) if isinstance(value, dict) else value for key, value in settings.items()
    }
    for key, value in suited.items():
        section, _, name = key.partition(".")
        if isinstance(filled.get(section, {}), dict) and name not in filled.get(section, {}):
            set_dotted(filled, key, value)
    return filled


def check_method(method: str, config: RunConfig) -> None:
    """Raises ValueError when integer codes are trained by another method than quzo, or quzo trains
    something else.
    """
    if (method == "quzo") != (config.qzo.parametrization == "codes"):
        raise ValueError(
            "qzo.parametrization: codes with method: quzo, and another one with any other method"
        )


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


AnyConfig = TypeVar("AnyConfig", bound=RunConfig)


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """All dotted keys: `data.batch_size`, `train.lr`, ..."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            keys += known_keys(annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def changed_settings(before: RunConfig, after: RunConfig) -> list[str]:
    """`key: old -> new` for every setting that differs."""
    flat = [_flatten(config.model_dump()) for config in (before, after)]
    return [
        f"{key}: {flat[0][key]!r} -> {flat[1][key]!r}"
        for key in flat[0]
        if flat[0][key] != flat[1][key]
    ]


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= (
            _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: no such file, not text, not YAML, or not a mapping.
    """
    remedy = "see configs/ for files that work"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"no file {path}", "a YAML file with settings", remedy) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} can't be read: {error}", "a YAML file in UTF-8", remedy
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}", "key: value lines", remedy) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} holds a {type(content).__name__}", "a mapping of sections", remedy
        )
    return content


def set_dotted(settings: dict[str, Any], key: str, value: Any) -> None:
    """settings["a"]["b"] = value for the key "a.b"; a section that is not a mapping is replaced by
    one.
    """
    *sections, last = key.split(".")
    for section in sections:
        inner = settings.get(section)
        if not isinstance(inner, dict):
            inner = settings[section] = {}
        settings = inner
    settings[last] = value


def parse_override(text: str, kind: type[RunConfig] = Config) -> tuple[str, Any]:
    """`train.max_steps=10` -> ("train.max_steps", 10); the value is YAML.

    Raises:
        ConfigError: no `=`, an unknown key, or a value that is not YAML.
    """
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"argument {text!r}",
            "section.key=value, for example train.lr=1e-3",
            "write it as key=value",
        )
    if key not in known_keys(kind):
        raise unknown_key(key, kind)
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{key}={raw!r}: {error}", "a plain YAML value", f"quote it: '{key}=\"...\"'"
        ) from None
    return key, value


def unknown_key(key: str, kind: type[RunConfig] = Config) -> ConfigError:
    known = known_keys(kind)
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    tail = difflib.get_close_matches(
        key.split(".")[-1], [k.split(".")[-1] for k in known], n=1, cutoff=0.7
    )
    same_tail = [k for k in known if tail and k.split(".")[-1] == tail[0]]
    guess = close or same_tail
    remedy = (
        f"did you mean {guess[0]!r}?"
        if guess
        else "see `qzo-diffuse train --help` and configs/ for the keys"
    )
    return ConfigError(f"unknown setting {key!r}", "a known one", remedy)


def make_config(settings: dict[str, Any], kind: type[AnyConfig] = Config) -> AnyConfig:  # type: ignore[assignment]
    """Check a nested mapping of settings.

    Raises:
        ConfigError: the first thing that is wrong, with its dotted key.
    """
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        raise _explain(error, kind) from None


def load_config(path: Path, kind: type[AnyConfig] = Config) -> AnyConfig:  # type: ignore[assignment]
    return make_config(read_yaml(path), kind)


def _explain(error: ValidationError, kind: type[RunConfig]) -> ConfigError:
    errors = error.errors()
    first, key = errors[0], _key(errors[0]["loc"])
    if first["type"] == "extra_forbidden":
        return unknown_key(key, kind)
    # A setting of several kinds has an error for each: all of them say what it may be.
    expected = [
        one["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        for one in errors
        if _key(one["loc"]) == key
    ]
    remedy = f"correct {key or 'the settings'} and start again"
    return ConfigError(
        f"{key or 'settings'} = {first['input']!r}", " or ".join(dict.fromkeys(expected)), remedy
    )


# which pydantic adds to the name of a setting of several kinds
KINDS = ("constrained", "int", "float", "str", "list[", "literal[")


def _key(place: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in place if not str(part).startswith(KINDS))
