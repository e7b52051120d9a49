"""The settings that are judged, each under a name.

`default` is written out, so that it stays what it was when the package's defaults change. All
others are it with some settings changed.
"""

import copy
from collections.abc import Mapping
from typing import Any

Settings = dict[str, Any]
STEPS = 300  # of 32 forward passes

DEFAULT: Settings = {
    "method": "qzo",
    "train": {
        "lr": 0.1,
        "calibrate_lr": True,
        "schedule": "inverse_sqrt",
        "warmup_steps": 0,
        "optimizer": "sgd",
        "validate_every": 100,
        "checkpoint_every": 0,
    },
    "qzo": {
        "parametrization": "separable",
        "layers": None,
        "units": "relative",
        "eps": 0.01,
        "num_directions": 8,
        "estimator": "leave_one_out",
        "per_example": True,
        "regions": 16,
        "normalize": True,
        "directions": "rademacher",
        "clip_threshold": None,
    },
    "prior": {"decay": 0.0, "bound": None},
    "quant": {
        "type": "nf4",
        "blocksize": 64,
        "backend": "bnb",
        "activations": "float",
        "skip": ["pos_embed", "time_text_embed", "context_embedder", "norm_out", "proj_out"],
    },
    "data": {"batch_size": 4, "repeats": 1, "flip": False, "caption_dropout": 0.0},
    "sigma": {"distribution": "uniform", "shift": 1.0},
    "sample": {"every": 0, "steps": 16, "guidance": 2.0, "negative_prompt": "", "seed": 0},
}


def changed(settings: Mapping[str, Any], **changes: Any) -> Settings:
    """A copy of nested settings with some changed; `train__lr` stands for train.lr."""
    found = copy.deepcopy(dict(settings))
    for key, value in changes.items():
        *sections, last = key.split("__")
        inner = found
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return found


def merged(settings: Mapping[str, Any], other: Mapping[str, Any]) -> Settings:
    """A copy of nested settings with those of `other` laid over it."""
    found = copy.deepcopy(dict(settings))
    for key, value in other.items():
        inner = found.get(key)
        both = isinstance(inner, dict) and isinstance(value, Mapping)
        found[key] = merged(inner, value) if both else copy.deepcopy(value)
    return found


# The exact gradient of the same numbers, by Adam. Its best step counts, which the held-out loss
# chooses: with every step it fits the images closer.
FIRST_ORDER = changed(
    DEFAULT,
    method="fo-scales",
    train__lr=0.01,
    train__calibrate_lr=False,
    train__schedule="constant",
    train__validate_every=25,
    train__checkpoint_every=25,
    data__batch_size=16,
)
# A number for every scale, along one direction at a time.
DENSE = {
    "qzo__parametrization": "dense",
    "qzo__num_directions": 1,
    "qzo__estimator": "antithetic",
    "qzo__per_example": False,
    "qzo__regions": 1,
    "qzo__normalize": False,
}
FIRST_ORDER_DENSE = changed(FIRST_ORDER, **DENSE)
METHODS: dict[str, Settings] = {
    "default": DEFAULT,
    "bound": changed(DEFAULT, prior__bound=0.13),
    "decay_0.3": changed(DEFAULT, prior__decay=0.3),
    "first_order": FIRST_ORDER,
    "first_order_dense": FIRST_ORDER_DENSE,
}
# methods whose best checkpoint by held-out loss counts, not the last
BEST_STEP = ("first_order", "first_order_dense")
