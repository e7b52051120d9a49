"""The settings that nobody gave: which value suits them, where it follows from others.

The tables of rules below are the whole of it. `filled` applies one from top to bottom, and
docs/settings.md shows them.
"""

import math
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SHARED = ("dense", "codes")  # numbers that have one direction for all examples
PROBES = 32  # forward passes of one example that a step makes where nothing is said
DIRECTIONS = 8  # of them for each example
BOUND = 0.13  # of |θ| for pictures, before calibration (docs/decisions/keeping_content.md D76)
BOTH_OVER_ROWS = 2  # the normalised rate of rows and columns, over that of rows
PLAIN_LR = 3e-3  # of steps that are not normalised; they depend on the loss, so no rate suits all
NOT_GIVEN = None  # in a rule's condition
GIVEN = object()  # in a rule's condition: any value but an empty one
Known = Mapping[str, Any]  # dotted key -> value that was given, follows, or stands for all runs


@dataclass(frozen=True)
class Formula:
    """A value that is computed from other settings, and the words for it."""

    words: str
    of: Callable[[Known], Any]


@dataclass(frozen=True)
class Rule:
    """`setting` is `value` where nobody gave it and every setting of `when` has the value there, or
    one of them.
    """

    setting: str
    value: Any
    when: Mapping[str, Any] = field(default_factory=dict)

    def holds(self, known: Known) -> bool:
        return all(_is_one_of(known.get(key), wanted) for key, wanted in self.when.items())


def _is_one_of(value: Any, wanted: Any) -> bool:
    if wanted is GIVEN:
        return bool(value)
    return value in wanted if isinstance(wanted, tuple) else bool(value == wanted)


def rules(values: Mapping[str, Any], **when: Any) -> list[Rule]:
    """A rule for each of several settings under one condition, qzo__eps for qzo.eps."""
    condition = {key.replace("__", "."): value for key, value in when.items()}
    return [Rule(setting, value, condition) for setting, value in values.items()]


def suited_lr(max_steps: int, estimator: str = "leave_one_out", schedule: str = "cosine") -> float:
    """Return the rate of normalised steps: 0.08 for 500 of them (antithetic 0.05), in proportion to
    1 / √steps, and at most twice as much.

    The randomness of directions leaves a random walk of lr · √steps in every number, and the rate
    must keep that small. 32 probes give 28 effective directions with leave_one_out, and 16 with
    antithetic probes. The schedule inverse_sqrt falls by itself: it begins with 0.1 (0.0625) for
    any number of steps.
    """
    of_500_steps = 0.08 if estimator == "leave_one_out" else 0.05
    if schedule == "inverse_sqrt":
        return 1.25 * of_500_steps
    return of_500_steps * min(2.0, math.sqrt(500 / max(1, max_steps)))


def normalised_lr(divisor: int = 1) -> Formula:
    def rate(known: Known) -> float:
        try:
            steps = int(known["train.max_steps"])  # a flag's value is text
        except (TypeError, ValueError, OverflowError):
            return PLAIN_LR  # no number of steps: the check behind this one refuses it
        return suited_lr(steps, known["qzo.estimator"], known["train.schedule"]) / divisor

    part = f", over {divisor}" if divisor > 1 else ""
    words = (
        "0.08 · min(2, √(500 / `train.max_steps`)), and 0.1 with `inverse_sqrt`; with `antithetic` "
        f"0.05 and 0.0625 in their place{part}"
    )
    return Formula(words, rate)


def _examples_of_a_step(known: Known) -> int:
    directions = known["qzo.num_directions"]
    return max(1, PROBES // max(1, directions)) if isinstance(directions, int) else PROBES // 2


NORMALISED = (True, "running")
OF_ROWS = ("row", "separable")
FACTORS = ("qzo", "quzo")  # methods that train factors of rows and columns

# Formats that bitsandbytes does not have.
OF_PLAIN_TORCH = rules({"quant.backend": "reference"}, quant__type=("bof4", "bof4s", "svdquant"))
# Integer codes along factors of rows and columns take the settings of scales.
QUZO = rules({"quant.backend": "intgrid", "quant.type": "int8"}, method="quzo")
# Each code by itself. The rate is in codes that a typical step moves each number. A constant rate
# ends in noise, and under a cosine nothing reaches a code any more half way. A code is 3 % of a
# typical weight in int8, 40 % in int4 and 6 to 12 % in fp8; rounded probes of int4 would drown
# everything (docs/decisions/rates.md D28).
EACH_CODE = (
    rules({"train.optimizer": "feedback", "train.schedule": "linear"}, qzo__parametrization="codes")
    + rules({"qzo.eps": 1.0}, qzo__parametrization="codes", quant__type="int8")
    + rules(
        {"qzo.eps": 0.1, "qzo.probe": "float", "train.lr": 0.05},
        qzo__parametrization="codes",
        quant__type="int4",
    )
    + rules({"qzo.eps": 0.25, "train.lr": 0.15}, qzo__parametrization="codes", quant__type="fp8")
    + rules({"train.lr": 0.2}, qzo__parametrization="codes")
)
# First-order on the scales: the rate that the convergence benchmark found for styles.
FIRST_ORDER_SCALES = rules({"train.lr": 1e-3, "qzo.parametrization": "dense"}, method="fo-scales")

# Numbers that all examples share have one direction, probed on both sides, and no normalisation.
ESTIMATE = [
    *rules({"qzo.per_example": False}, qzo__parametrization=SHARED),
    *rules({"qzo.num_directions": 1}, qzo__per_example=False),
    *rules({"qzo.num_directions": 1}, qzo__estimator="antithetic"),
    *rules({"qzo.estimator": "antithetic"}, qzo__per_example=False),
    *rules({"qzo.estimator": "antithetic"}, qzo__num_directions=1),
    *rules({"qzo.normalize": False}, qzo__per_example=False),
]
# A step has the same number of forward passes however it probes.
BATCH = [
    *rules(
        {
            "data.batch_size": Formula(
                f"{PROBES} / `qzo.num_directions`, at least 1", _examples_of_a_step
            )
        },
        method=FACTORS,
        qzo__per_example=True,
        qzo__estimator="leave_one_out",
    ),
    Rule("data.batch_size", PROBES // 2),
]


def _voted_lr(known: Known) -> float:
    try:
        return 0.04 * math.sqrt(
            int(known["data.batch_size"]) / max(1, int(known["train.max_steps"]))
        )
    except (TypeError, ValueError, OverflowError):
        return PLAIN_LR  # the check behind this one refuses the number


# A choice has a side and no size, so each moves the few numbers by lr over the pairs of a round. Of
# N choices between d numbers the part along the gradient grows as N and the rest as the root of
# N · d; the rate falls with the root of the rounds, so that the rest stays below the bound.
VOTES = rules(
    {
        "qzo.parametrization": "layer",
        "qzo.estimator": "antithetic",
        "qzo.normalize": False,
        "qzo.eps": 0.1,
        "data.batch_size": 10,
        "train.max_steps": 20,
        "train.schedule": "constant",
        "train.lr": Formula(
            "0.04 · √(`data.batch_size` / `train.max_steps`)",
            _voted_lr,
        ),
        "train.checkpoint_every": 5,
        "sample.every": 5,
        "prior.bound": BOUND,
    },
    method="qzo",
    reward__scores=["votes"],
)
OF_VOTES = frozenset(rule.setting for rule in VOTES)
# A score is one number for a whole picture, and the scores of different pictures have no common
# curvature, so that nothing is calibrated.
REWARDS = rules(
    {
        "qzo.regions": 1,
        "qzo.eps": 3e-2,
        "train.calibrate_lr": False,
        "train.schedule": "linear",
        "train.lr": 0.05,
    },
    method="qzo",
    reward__scores=GIVEN,
)
# A style is in the rows of the layers that write to the image's stream; columns of blocks tear
# shapes (docs/decisions/keeping_content.md D95).
ROWS = [
    *rules({"qzo.parametrization": "row"}, method="qzo", reward__scores=[]),
    *rules({"qzo.layers": "image"}, method="qzo", qzo__parametrization="row"),
]
# Pictures are divided into 16 patch groups. Their rate falls by itself, and is calibrated where
# nobody chose it.
PICTURES = [
    *OF_PLAIN_TORCH,
    *QUZO,
    *EACH_CODE,
    *FIRST_ORDER_SCALES,
    *VOTES,
    *ESTIMATE,
    *REWARDS,
    *ROWS,
    *rules({"qzo.regions": 16}, method=FACTORS, qzo__per_example=True),
    *rules(
        {"train.schedule": "inverse_sqrt"},
        method=FACTORS,
        qzo__per_example=True,
        qzo__normalize=NORMALISED,
        qzo__parametrization=OF_ROWS,
    ),
    *rules(
        {"train.calibrate_lr": True},
        method=FACTORS,
        qzo__per_example=True,
        qzo__normalize=NORMALISED,
        qzo__parametrization=OF_ROWS,
        train__lr=NOT_GIVEN,
    ),
    *rules(
        {"prior.bound": BOUND},
        method=FACTORS,
        qzo__per_example=True,
        qzo__normalize=NORMALISED,
        qzo__parametrization="separable",
    ),
    *rules({"train.lr": PLAIN_LR}, qzo__normalize=False),
    # fewer numbers have less noise (docs/decisions/estimator.md D108)
    *rules({"train.lr": normalised_lr()}, method="qzo", qzo__subspace=GIVEN),
    *rules({"train.lr": normalised_lr(BOTH_OVER_ROWS)}, method="qzo", qzo__parametrization="row"),
    Rule("train.lr", normalised_lr()),
    *BATCH,
]

# The layers that have the least noise for their signal, by quant.choose. Probes of them change the
# loss less, so that in bfloat16 they need a larger radius (docs/decisions/language_models.md D42).
MIDDLE_BLOCKS: dict[str, Any] = {"qzo.layers": "quiet", "qzo.eps": 3e-2}
# the normalised rate of pictures, over those of texts for these layers and for all
PICTURES_OVER_QUIET, PICTURES_OVER_ALL = 2, 5
# QZO's rates were found on SmolLM2 and SST-2 (docs/decisions/rates.md D25), MeZO's and QLoRA's are
# those of their papers; quzo-lora has the radius and the rate of MeZO's LoRA runs.
TEXTS = [
    *OF_PLAIN_TORCH,
    *rules(
        {
            "train.lr": 1e-6,
            "train.schedule": "constant",
            "qzo.parametrization": "dense",
            "qzo.units": "absolute",
            "qzo.eps": 1e-3,
            "qzo.directions": "gaussian",
        },
        method="mezo",
    ),
    *QUZO,
    *EACH_CODE,
    *rules(
        {
            "train.lr": 1e-4,
            "train.schedule": "constant",
            "quant.backend": "intgrid",
            "quant.type": "int8",
            "qzo.parametrization": "dense",
            "qzo.units": "absolute",
            "qzo.eps": 1e-2,
        },
        method="quzo-lora",
    ),
    *rules(
        {"train.lr": 2e-4, "train.schedule": "linear", "qzo.parametrization": "dense"},
        method="qlora",
    ),
    *FIRST_ORDER_SCALES,
    *ESTIMATE,
    *rules({"qzo.layers": MIDDLE_BLOCKS["qzo.layers"]}, method=FACTORS, qzo__normalize=NORMALISED),
    *rules(
        {"qzo.eps": MIDDLE_BLOCKS["qzo.eps"]},
        method=FACTORS,
        qzo__normalize=NORMALISED,
        qzo__layers="quiet",
    ),
    *rules({"train.lr": 1e-3}, method=FACTORS, qzo__normalize=False),
    *rules(
        {"train.lr": normalised_lr(PICTURES_OVER_QUIET)},
        method=FACTORS,
        qzo__layers="quiet",
    ),
    *rules({"train.lr": normalised_lr(PICTURES_OVER_ALL)}, method=FACTORS),
    *rules({"train.lr": PLAIN_LR}, qzo__normalize=False),
    Rule("train.lr", normalised_lr()),
    *BATCH,
]


def filled(
    given: Mapping[str, Any], table: Sequence[Rule], usual: Mapping[str, Any]
) -> dict[str, Any]:
    """The nested settings `given`, with those that follow from them by the rules of `table`.

    Args:
        usual: dotted key -> the value that the setting has where no rule says otherwise.

    A section that is no mapping stays as it is: the check behind this one refuses it.
    """
    settings = {key: dict(at) if isinstance(at, Mapping) else at for key, at in given.items()}
    found = flat(settings)
    known = ChainMap(found, {key: at for key, at in usual.items() if key != "train.lr"})
    for rule in table:
        section, _, name = rule.setting.partition(".")
        there = settings.get(section, {})
        if not isinstance(there, dict) or name in there or not rule.holds(known):
            continue
        value = rule.value.of(known) if isinstance(rule.value, Formula) else rule.value
        found[rule.setting] = value
        set_dotted(settings, rule.setting, value)
    return settings


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1}} -> {"train.lr": 1}"""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        inner = flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else None
        found |= {f"{prefix}{key}": value} if inner is None else inner
    return found


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
