"""Models of diffusers without memory for their weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qzo_diffusion.core.errors import ModelError


def from_config(
    kind: Any, config: Mapping[str, Any], name: str, expected: str, remedy: str
) -> nn.Module:
    """Build the model of a config with all its tensors on the meta device.

    Args:
        kind: a model class of diffusers.
        name: the name of the model, for an error.

    Raises:
        ModelError: diffusers refuses the config.
    """
    settings = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        with torch.device("meta"):
            model: nn.Module = kind.from_config(settings)
            return model.eval()
    except Exception as error:  # a wrong value may raise anything in diffusers
        raise ModelError(
            f"a {name} config that diffusers refuses: {error}", expected, remedy
        ) from None
