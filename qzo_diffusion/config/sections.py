"""The settings that every run has, whatever it trains, section by section.

A setting is described once, here or in `style` and `llm`. Configs stop at `runs/build.py`; below it
everything takes plain arguments.
"""

from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from qzo_diffusion.config.defaults import (
    DIRECTIONS,
    PROBES,
    SHARED,
    estimate_settings,
    rate_for,
    suited_batch_size,
    suited_lr,
)

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

Count = Annotated[int, Field(ge=1)]

GRID_TYPES = ("int8", "int4", "fp8")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


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


def check_method(method: str, config: RunConfig) -> None:
    """Raises ValueError when integer codes are trained by another method than quzo, or quzo trains
    something else.
    """
    if (method == "quzo") != (config.qzo.parametrization == "codes"):
        raise ValueError(
            "qzo.parametrization: codes with method: quzo, and another one with any other method"
        )
