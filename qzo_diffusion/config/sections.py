"""The settings that every run has, whatever it trains, section by section.

A setting is described once, here or in `style` and `llm`. Configs stop at `runs/build.py`; below it
everything takes plain arguments.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from qzo_diffusion.config.defaults import DIRECTIONS, PICTURES, SHARED, Rule, filled, flat
from qzo_diffusion.config.kinds import Count, NotNegative, PathOrName, Positive, Seed, Whole

GRID_TYPES = ("int8", "int4", "fp8")
PLAIN_TORCH = ("bof4", "bof4s", "svdquant")  # of the back-end "reference" alone


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)


class TrainConfig(Section):
    max_steps: Whole = 1000
    """number of steps"""
    lr: Positive = 0.1
    """learning rate: how far a step moves where qzo.normalize is on"""
    calibrate_lr: bool = False
    """before the first step, lower lr where the loss curves much for its slope"""
    schedule: Literal["constant", "linear", "cosine", "hold", "inverse_sqrt"] = "cosine"
    """how the rate falls from step to step"""
    warmup_steps: Whole = 0
    """steps in which the rate rises to lr"""
    optimizer: Literal["sgd", "momentum", "adam", "feedback"] = "sgd"
    """feedback: of integer codes; rounding errors are added to later steps"""
    state_bits: Literal[32, 8, 4, 3, 2] = 32
    """of each number that momentum or adam remembers, adam of method fo-scales included; second
    moments of 4 and fewer round at random (SOLO)"""
    feedback_decay: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """share of a rounding error that is kept for the next step"""
    feedback_steps: Count = 40
    """steps whose rounding errors are computed again from the journal"""
    micro_batch_size: Count | None = None
    """probes of examples in one forward pass; null: what fits and is fast for pictures, all for
    texts"""
    seed: Seed = 0
    """seed of directions, noise and order"""
    validate_every: Whole = 100
    """steps between two held-out losses; 0: only at the start and the end"""
    checkpoint_every: Whole = 100
    """steps between two checkpoints; 0: only when stopped. The journal alone can rebuild a run"""
    keep_checkpoints: Count = 3
    """newest checkpoints that are kept, besides the best"""
    patience: Count | None = None
    """end after so many validations without a lower held-out loss; final/ then holds the step of
    the lowest. null: no such end"""
    max_minutes: Positive | None = None
    """end after so many minutes of one command, loading included; --resume goes on. null: no such
    end"""

    @model_validator(mode="after")
    def _patience_needs_validations(self) -> "TrainConfig":
        if self.patience is not None and not self.validate_every:
            raise ValueError("validate_every: 1 or more, or patience: null")
        return self


class QzoConfig(Section):
    parametrization: Literal["dense", "row", "layer", "column", "separable", "codes"] = "separable"
    """numbers that are trained: one for a scale, a row, a layer, a column, or row and column;
    codes: each code by itself, of method quzo"""
    layers: list[str] | Literal["quiet", "image"] | None = None
    """parts of layer names, such as ff.net; image: layers that write to the image's stream; middle
    (or quiet): the middle blocks; null: every quantized layer"""
    units: Literal["relative", "absolute"] = "relative"
    """relative: a number multiplies its scale; absolute: it is added"""
    eps: Positive = 1e-2
    """perturbation radius"""
    num_directions: Count = DIRECTIONS
    """directions of each example, or of all together"""
    estimator: Literal["antithetic", "leave_one_out"] = "leave_one_out"
    """leave_one_out: one forward pass for a direction, compared with the mean of the example's
    others; antithetic: two, at +eps and -eps"""
    per_example: bool = True
    """directions of its own for every example of the batch; not for dense numbers or codes"""
    regions: Annotated[int, Field(ge=1, le=1024)] = 1
    """patch groups of a picture, each with directions of its own in token-wise layers; may be
    written patch_groups"""
    normalize: bool | Literal["running"] = True
    """divide derivatives by their rms, so that lr does not depend on the loss; running: by that of
    the last ten steps or so"""
    directions: Literal["rademacher", "gaussian"] = "rademacher"
    """distribution of random directions"""
    probe: Literal["codes", "float"] = "codes"
    """perturbed integer codes: rounded to the grid, or as they are"""
    clip_threshold: Positive | None = None
    """largest directional derivative (DDC); null: no clipping"""
    subspace: PathOrName | None = None
    """file of directions of rows, which `qzo-diffuse subspace` makes; only sums of them are tried.
    tiny: that of the embedded model; null: all directions"""

    @property
    def scales_activations(self) -> bool:
        """Whether theta scales inputs and outputs, so that each example can have its own
        perturbation.
        """
        return self.parametrization not in SHARED

    @model_validator(mode="after")
    def _absolute_needs_dense(self) -> "QzoConfig":
        if self.units == "absolute" and self.parametrization != "dense":
            raise ValueError("units: absolute needs parametrization: dense")
        return self

    @model_validator(mode="after")
    def _examples_need_their_own_numbers(self) -> "QzoConfig":
        if self.per_example and not self.scales_activations:
            raise ValueError("per_example: true needs a parametrization other than dense or codes")
        if self.estimator == "leave_one_out" and self.num_directions == 1:
            raise ValueError(
                "estimator: leave_one_out needs num_directions: 2 or more; of one direction there "
                "are no others"
            )
        if self.regions > 1 and not self.per_example:
            raise ValueError("regions above 1 need per_example: true")
        return self

    @model_validator(mode="after")
    def _subspaces_are_of_rows(self) -> "QzoConfig":
        if self.subspace is not None and self.parametrization != "row":
            raise ValueError(
                "subspace: null, or parametrization: row with method: qzo, along whose rows it goes"
            )
        return self

    @model_validator(mode="after")
    def _one_number_is_not_normalised(self) -> "QzoConfig":
        if self.normalize is True and not self.per_example and self.num_directions == 1:
            raise ValueError(
                "normalize: true needs per_example: true or several directions; of one only the "
                "sign would be left"
            )
        return self


class QuantConfig(Section):
    type: Literal["nf4", "fp4", "bof4", "bof4s", "svdquant", "int8", "int4", "fp8"] = "nf4"
    """format of the quantized weights"""
    blocksize: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    """weights that share a scale, in formats of 4 bits"""
    backend: Literal["bnb", "reference", "intgrid"] = "bnb"
    """bnb: bitsandbytes; reference: plain torch; intgrid: integer codes, for int8, int4 and fp8"""
    activations: Literal["float", "int8", "int4"] = "float"
    """inputs are rounded with a scale for each token by intgrid (int4 with type int4 alone), int4
    with a scale for each run of quant.blocksize inputs by svdquant"""
    _types_elsewhere: ClassVar[tuple[str, ...]] = ("nf4", "fp4")
    skip: list[str] | None = None
    """layers that stay as they are, by parts of their names; null: those of the model's family"""

    @model_validator(mode="after")
    def _of_one_backend(self) -> "QuantConfig":
        if self.backend == "intgrid" and self.type not in GRID_TYPES:
            raise ValueError(f"type: {', '.join(GRID_TYPES)} with backend: intgrid")
        elsewhere = self._types_elsewhere + (PLAIN_TORCH if self.backend == "reference" else ())
        if self.backend != "intgrid" and self.type not in elsewhere:
            raise ValueError(f"type: {', '.join(elsewhere)} with backend: {self.backend}")
        if self.activations == "int8" and self.backend != "intgrid":
            raise ValueError("activations: float, or backend: intgrid")
        if self.activations == "int4" and self.type not in ("svdquant", "int4"):
            raise ValueError("activations: float, or type: svdquant or int4 with activations: int4")
        return self


class PriorConfig(Section):
    decay: NotNegative = 0.0
    """share of lr by which a step first takes every number back towards the base"""
    bound: Positive | None = None
    """how far a number may go from the base; where train.calibrate_lr is on, times slope over
    curvature, so that a style which is further away has more room. null: no bound"""

    @property
    def off(self) -> bool:
        return not self.decay and self.bound is None


class ComputeConfig(Section):
    device: str = "auto"
    """auto, cpu, cuda (NVIDIA and AMD), xpu (Intel), mps (Apple), or one of several: cuda:1"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """of activations and unquantized weights"""
    vae_device: str | None = None
    """null: the same; cpu spares the memory of a small card"""
    vae_tile: Annotated[int, Field(ge=64, multiple_of=8)] | None = 512
    """pixels; larger images go through the VAE in such squares; null: whole"""
    rank_timeout: Positive = 1800.0
    """seconds that a process waits for the others; the first one also samples and validates"""


class RunConfig(Section):
    """Settings that every kind of run has."""

    table: ClassVar[Sequence[Rule]] = PICTURES

    model: PathOrName = "auto"
    """auto, tiny, a Hub id in the local cache, or the path of a model"""
    train: TrainConfig = TrainConfig()
    qzo: QzoConfig = QzoConfig()
    prior: PriorConfig = PriorConfig()
    quant: QuantConfig = QuantConfig()
    compute: ComputeConfig = ComputeConfig()

    @model_validator(mode="before")
    @classmethod
    def _follow(cls, given: Any) -> Any:
        return filled(spelled(given), cls.table, usual(cls)) if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _calibrated_in_its_own_unit(self) -> "RunConfig":
        if self.train.calibrate_lr and not (self.qzo.normalize and self.qzo.per_example):
            raise ValueError(
                "train.calibrate_lr: false, or qzo.normalize: true with qzo.per_example: true"
            )
        return self

    @model_validator(mode="after")
    def _prior_of_numbers_that_are_kept(self) -> "RunConfig":
        if not self.prior.off and self.qzo.parametrization in SHARED:
            raise ValueError(
                "prior.decay: 0 and prior.bound: null, or qzo.parametrization: row, layer, column "
                "or separable; of dense scales and codes no distance from the base is kept"
            )
        if self.prior.decay * self.train.lr > 1:
            raise ValueError("prior.decay times train.lr: at most 1")
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

    @model_validator(mode="after")
    def _few_bits_of_something(self) -> "RunConfig":
        by_gradients = getattr(self, "method", "") in ("fo-scales", "qlora")
        remembers = by_gradients or self.train.optimizer in ("momentum", "adam")
        if self.train.state_bits != 32 and not remembers:
            raise ValueError(
                "train.state_bits: 32, or train.optimizer: momentum or adam, or method: fo-scales; "
                f"{self.train.optimizer} remembers nothing"
            )
        return self

    @property
    def trains_codes(self) -> bool:
        """Whether integer codes are trained in place of scales."""
        return getattr(self, "method", "") == "quzo"

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


# The field's words for settings and values that had others first; both are understood.
NEW_KEYS = {"qzo.patch_groups": "qzo.regions"}
NEW_VALUES = {"qzo.layers": {"middle": "quiet"}}


def spelled(given: dict[str, Any]) -> dict[str, Any]:
    """`given` with the names that are stored; a setting under both of its names keeps both, and the
    check behind this one refuses it.
    """
    sections = {key: dict(at) if isinstance(at, dict) else at for key, at in given.items()}
    for new, old in NEW_KEYS.items():
        section, _, name = new.partition(".")
        there, old_name = sections.get(section), old.partition(".")[2]
        if isinstance(there, dict) and name in there and old_name not in there:
            there[old_name] = there.pop(name)
    for key, words in NEW_VALUES.items():
        section, _, name = key.partition(".")
        there = sections.get(section)
        if isinstance(there, dict) and isinstance(there.get(name), str):
            there[name] = words.get(there[name], there[name])
    return sections


_USUAL: dict[type[RunConfig], dict[str, Any]] = {}


def usual(kind: type[RunConfig]) -> dict[str, Any]:
    """Dotted key -> the value that a setting has where nothing is given and no rule says
    otherwise.
    """
    if kind not in _USUAL:
        _USUAL[kind] = flat(kind.model_construct().model_dump())
    return _USUAL[kind]


def check_method(method: str, config: RunConfig) -> None:
    """Raises ValueError when integer codes are trained by another method than quzo, or quzo trains
    something else.
    """
    level = config.qzo.parametrization
    if method != "quzo" and level == "codes":
        raise ValueError("qzo.parametrization: codes with method: quzo")
    if method == "quzo" and (level == "dense" or config.quant.backend != "intgrid"):
        raise ValueError(
            "qzo.parametrization: separable, row, column, layer or codes, and quant.backend: "
            "intgrid, for method: quzo, which trains integer codes"
        )
