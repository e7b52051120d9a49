"""The config.json of a model, checked before anything is made in the sizes that it states."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.quant.json_file import read_object

LARGEST = 2**24  # of a width, a vocabulary or a length
MOST = 2**14  # of layers, heads or experts
SIZES = re.compile(r"size|dim|width|channels|position|length|d_model|d_ff|d_kv|n_embd")
COUNTS = re.compile(r"layers|heads|experts|depth|\bn_layer|\bn_head")


def read_config(file: Path, tensors: int = MOST) -> dict[str, Any]:
    """Raises ModelError unless the file describes a model of possible sizes.

    Args:
        tensors: how many tensors the model's files hold; a config of more layers is refused.
    """
    config = read_object(file, "the config of a model")
    for key, value in _numbers(config):
        most = min(MOST, tensors) if COUNTS.search(key) else LARGEST
        if not -1 <= value <= (MOST if "heads" in key or "experts" in key else most):
            raise ModelError(
                f"{file} says {key} = {value}",
                f"at most {most}, for {tensors} tensors on disk",
                "give weights and config of one model",
            )
    return config


def _numbers(config: Mapping[str, Any], inside: int = 2) -> Iterator[tuple[str, int]]:
    """Whole numbers that state a size or a count, by their key."""
    for key, value in config.items():
        if isinstance(value, dict) and inside:
            yield from _numbers(value, inside - 1)
        elif SIZES.search(key) or COUNTS.search(key):
            numbers = value if isinstance(value, list) else [value]
            yield from ((key, number) for number in numbers if type(number) is int)
