"""Settings of `qzo-diffuse train`: a style, from a folder of images."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from qzo_diffusion.config.defaults import DIRECTIONS, PROBES
from qzo_diffusion.config.kinds import (
    Count,
    FreeText,
    NoiseLevel,
    NotNegative,
    PathOrName,
    PathText,
    Positive,
    Seed,
    Whole,
)
from qzo_diffusion.config.reward import RewardConfig
from qzo_diffusion.config.sections import PriorConfig, RunConfig, Section, check_method


class DataConfig(Section):
    style_dir: PathOrName | None = None
    """folder of images in the style; captions beside them"""
    validation_dir: PathOrName | None = None
    """held-out images in the style; null: some of style_dir"""
    caption: FreeText | None = None
    """caption of images that have none; may hold [trigger]"""
    trigger: FreeText | None = None
    """word that replaces [trigger] in captions and prompts"""
    resolution: Annotated[int, Field(ge=16, multiple_of=16)] | None = None
    """side of a square of as many pixels as an image has; null: the model's own"""
    batch_size: Count = PROBES // DIRECTIONS
    """images of a step, or prompts of a step of rewards"""
    repeats: Count = 1
    """times that an image is seen in one pass over the data"""
    flip: bool = False
    """mirror images at random"""
    caption_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    """share of captions that are left out, for guidance"""
    masks: Literal["alpha", "file", "none"] = "none"
    """parts of images that count: file: white in NAME_mask.png; alpha: opaque in the image itself;
    none: all of it"""
    strict: bool = False
    """stop at the first image that can't be used"""
    cache_dir: PathText | None = None
    """folder of encoded images and prompts; null: the user's cache folder"""


class SigmaConfig(Section):
    distribution: Literal["uniform", "logit_normal"] = "uniform"
    """of noise levels in training"""
    shift: Positive = 1.0
    """towards high noise levels, above 1"""
    min: NoiseLevel = 0.0
    """lowest noise level in training; held-out losses keep the whole range"""
    max: NoiseLevel = 1.0
    """highest noise level in training, where 1 is pure noise"""
    min_snr: Positive | None = None
    """for models that predict noise or v: the most that an error of the latents counts, 5 is
    usual; null: all levels count alike"""

    @model_validator(mode="after")
    def _min_below_max(self) -> "SigmaConfig":
        if self.min >= self.max:
            raise ValueError(f"min below max, got {self.min:g} and {self.max:g}")
        return self


def _low_below_high(levels: list[float]) -> list[float]:
    low, high = levels
    if low >= high:
        raise ValueError("[LOW, HIGH] with LOW below HIGH")
    return levels


Levels = Annotated[
    list[NoiseLevel], Field(min_length=2, max_length=2), AfterValidator(_low_below_high)
]


class SampleConfig(Section):
    prompts: PathOrName | None = None
    """file with one prompt a line; null: the shipped grid prompts"""
    every: Whole = 100
    """steps between two sample grids; 0: only at the start and the end"""
    steps: Count | None = None
    """sampling steps; null: as suits the model (docs/models.md)"""
    guidance: NotNegative | None = None
    """guidance scale; null: as suits the model (docs/models.md)"""
    negative_prompt: FreeText = ""
    """prompt that guidance leads away from"""
    tuned_between: Levels | None = None
    """[LOW, HIGH]: pictures use the tuned scales at noise levels between, and the base's at the
    others; null: tuned everywhere"""
    seed: Seed = 0
    """prompt i is sampled from seed + i"""
    batch_size: Count | None = None
    """images that are sampled together; null: as many as fit, at most 8"""


class TextConfig(Section):
    t5: Literal["auto", "nf4", "full", "none"] = "auto"
    """of T5 or a language model; auto: in NF4 where its files are beyond 2 GB; none: zeros in its
    place"""
    t5_tokens: Count | None = None
    """null: the tokenizer's own limit, at most as many as the family's pipeline reads"""


class StylePriorConfig(PriorConfig):
    weight: NotNegative = 0.0
    """of the squared distance to the base's own prediction on the prior's pictures, which are
    added to each step; 0: off"""
    prompts: PathOrName | None = None
    """file of prompts without the style, one a line, whose pictures the base draws before the
    first step; null: the shipped grid prompts"""
    dir: PathOrName | None = None
    """folder of captioned pictures in place of drawn ones, as regularisation images"""
    batch_size: Count | None = None
    """pictures of the prior in a step; null: as many as data.batch_size"""

    @model_validator(mode="after")
    def _of_one_source(self) -> "StylePriorConfig":
        if self.prompts is not None and self.dir is not None:
            raise ValueError("prior.prompts or prior.dir; leave one of them out")
        given = [key for key in ("prompts", "dir", "batch_size") if getattr(self, key) is not None]
        if given and not self.weight:
            raise ValueError(f"prior.weight above 0 (1 is usual), or no prior.{given[0]}")
        return self


StyleMethod = Literal["qzo", "quzo", "fo-scales"]


class Config(RunConfig):
    """Settings of a style run."""

    method: StyleMethod = "qzo"
    """qzo: forward passes alone; quzo: integer codes; fo-scales: by gradients"""
    family: str | None = None
    """name of the model's family, as docs/models.md lists them; null: found from the model's
    files"""
    transformer: PathText | None = None
    """another one than the model's own: a folder, or a single file in the original layout,
    safetensors or GGUF"""
    init_from: PathText | None = None
    """a run, one of its checkpoints or a delta, whose scales this one begins with"""
    prior: StylePriorConfig = StylePriorConfig()
    data: DataConfig = DataConfig()
    sigma: SigmaConfig = SigmaConfig()
    sample: SampleConfig = SampleConfig()
    text: TextConfig = TextConfig()
    reward: RewardConfig = RewardConfig()

    @model_validator(mode="after")
    def _by_one_method(self) -> "Config":
        check_method(self.method, self)
        return self

    @model_validator(mode="after")
    def _subspaces_are_of_scales(self) -> "Config":
        if self.qzo.subspace is not None and self.method != "qzo":
            raise ValueError("qzo.subspace: null, or method: qzo")
        return self

    @model_validator(mode="after")
    def _weight_counts(self) -> "Config":
        if self.prior.weight and self.qzo.parametrization == "codes":
            raise ValueError("prior.weight: 0, or method: qzo; of codes no base is kept")
        return self

    @model_validator(mode="after")
    def _rewards_of_forward_passes(self) -> "Config":
        if not self.reward.scores:
            return self
        if self.method != "qzo" or not self.qzo.per_example:
            raise ValueError("method: qzo and qzo.per_example: true, or reward.scores: []")
        if self.qzo.regions > 1:
            raise ValueError("qzo.regions: 1, or reward.scores: []; a picture has one score")
        if self.sample.tuned_between is not None:
            raise ValueError(
                "sample.tuned_between: null, or reward.scores: []; a picture is scored as a whole"
            )
        return self

    @model_validator(mode="after")
    def _votes_compare_two_pictures(self) -> "Config":
        if not self.reward.by_votes:
            return self
        if self.qzo.estimator != "antithetic" or self.qzo.num_directions > 1:
            raise ValueError(
                "qzo.estimator: antithetic and qzo.num_directions: 1, or reward.scores other than "
                "[votes]; a person compares two pictures"
            )
        if not self.reward.normalize or self.train.calibrate_lr:
            raise ValueError(
                "reward.normalize: true and train.calibrate_lr: false, or reward.scores other than "
                "[votes]; a choice has a side and no size"
            )
        return self

    @property
    def prior_examples(self) -> int:
        """Pictures of the prior in a step."""
        return (self.prior.batch_size or self.data.batch_size) if self.prior.weight else 0

    @property
    def examples(self) -> int:
        """Images of the style and pictures of the prior in a step."""
        return self.data.batch_size + self.prior_examples
