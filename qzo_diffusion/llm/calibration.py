"""Inputs of a language model's layers on a calibration text, in the unquantized model."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qzo_diffusion.core.errors import DataError
from qzo_diffusion.core.hooks import Hooks

WINDOW = 256  # tokens of one forward pass
WINDOWS = 4
KEPT = 512  # tokens whose inputs are kept, for each layer
SEED = 0


def read_text(path: Path) -> str:
    """Return the text of a file. Raises DataError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the calibration text {path} can't be read: {error}",
            "a text file in UTF-8",
            "correct quant.calibration",
        ) from None


def windows_of(ids: list[int]) -> Tensor:
    """Return the first tokens of a text as int64 [WINDOWS, WINDOW].

    Raises:
        DataError: the text is too short.
    """
    needed = WINDOWS * WINDOW
    if len(ids) < needed:
        raise DataError(
            f"a calibration text of {len(ids)} tokens",
            f"at least {needed}",
            "give a longer text as quant.calibration",
        )
    return torch.tensor(ids[:needed]).view(WINDOWS, WINDOW)


@torch.no_grad()
def layer_inputs(model: Any, windows: Tensor, layers: Iterable[str]) -> Mapping[str, Tensor]:
    """Return the inputs of `layers` at randomly drawn tokens: fp32 [KEPT, K], the same tokens for
    each layer.

    Args:
        windows: int64 [windows, tokens].
    """
    generator = torch.Generator().manual_seed(SEED)
    kept = torch.randperm(windows.numel(), generator=generator)[:KEPT].sort().values
    found: dict[str, Tensor] = {}
    hooks = Hooks()

    def keep(name: str) -> Any:
        def seen(_module: Any, args: tuple[Any, ...]) -> None:
            found[name] = args[0].detach().flatten(0, -2)[kept].float()

        return seen

    try:
        for name in layers:
            hooks.before(model.get_submodule(name), keep(name))
        model.base_model(input_ids=windows, use_cache=False)
    finally:
        hooks.remove()
    return found
