"""What suits the settings that are not given, where it depends on those that are."""

import math
from collections.abc import Mapping
from typing import Any

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


# What suits training of codes where nothing is said, in pictures and texts alike
# (docs/decisions/rates.md D28, docs/quzo.md).
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
