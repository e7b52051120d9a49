"""The settings of a language model's run that follow from others."""

import pytest

from qzo_diffusion.config.files import make_config
from qzo_diffusion.config.llm import LlmConfig


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"train": {"max_steps": 500}},
            {
                "lr": 0.04,
                "parametrization": "separable",
                "layers": "quiet",
                "eps": 0.03,
                "per_example": True,
                "schedule": "cosine",
            },
        ),
        (
            {"qzo": {"normalize": False}},
            {"lr": 1e-3, "parametrization": "separable", "layers": None, "eps": 0.01},
        ),
        ({"train": {"max_steps": 2000}}, {"lr": 0.02, "normalize": True}),
        (
            {"qzo": {"layers": None}, "train": {"max_steps": 2000}},
            {"lr": 0.008, "parametrization": "separable", "eps": 0.01},
        ),
        (
            {"qzo": {"layers": ["mlp"], "eps": 0.02}, "train": {"max_steps": 2000}},
            {"lr": 0.008, "layers": ["mlp"], "eps": 0.02},
        ),
        ({"qzo": {"parametrization": "row"}}, {"parametrization": "row", "layers": "quiet"}),
        ({"quant": {"type": "int8"}}, {"parametrization": "separable", "layers": "quiet"}),
        (
            {"qzo": {"parametrization": "dense"}},
            {"lr": 1e-3, "per_example": False, "normalize": False},
        ),
        (
            {"method": "mezo"},
            {
                "lr": 1e-6,
                "eps": 1e-3,
                "units": "absolute",
                "directions": "gaussian",
                "schedule": "constant",
            },
        ),
        ({"method": "mezo", "train": {"lr": 1e-7}}, {"lr": 1e-7, "per_example": False}),
        ({"method": "qlora"}, {"lr": 2e-4}),
        (
            {"method": "quzo", "train": {"max_steps": 500}},
            {
                "lr": 0.04,
                "parametrization": "separable",
                "layers": "quiet",
                "eps": 0.03,
                "per_example": True,
                "optimizer": "sgd",
            },
        ),
        (
            {"method": "quzo", "qzo": {"parametrization": "codes"}},
            {
                "layers": None,
                "eps": 1.0,
                "lr": 0.2,
                "per_example": False,
                "normalize": False,
                "optimizer": "feedback",
            },
        ),
    ],
)
def test_what_is_not_given_suits_the_method(settings, expected):
    config = make_config(settings, LlmConfig)
    found = {**config.train.model_dump(), **config.qzo.model_dump(), "skip": config.quant.skip}
    assert {key: found[key] for key in expected} == expected
    assert (found["regions"], found["skip"]) == (1, ["lm_head"])
    assert make_config(config.model_dump(), LlmConfig) == config
