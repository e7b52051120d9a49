"""A run that begins with what another run tuned: `train --init-from RUN`, for more images or
another style on top of it.
"""

from pathlib import Path

from torch import Tensor, nn

from qzo_diffusion.config.style import Config
from qzo_diffusion.core.delta import expanded
from qzo_diffusion.core.errors import ConfigError, ModelError
from qzo_diffusion.core.merge import merge_changes_
from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.quant.load import frozen_fingerprint
from qzo_diffusion.runs import provenance
from qzo_diffusion.train.run_folder import load_scales


def described(config: Config) -> str:
    """What a run begins with, in a line; checked as far as that goes before a model is loaded.

    Raises:
        OutputError: there are no tuned scales at `init_from`, or they are damaged.
        ConfigError: they were tuned over another quantization.
    """
    _, facts = load_scales(Path(config.init_from or ""))
    theirs = facts.get("qzo.quant_type"), facts.get("qzo.blocksize")
    ours = config.quant.type, str(config.quant.blocksize)
    if theirs != ours:
        raise ConfigError(
            f"init_from {config.init_from}, tuned over {theirs[0]} in blocks of {theirs[1]}",
            f"a run over {ours[0]} in blocks of {ours[1]}, as this one",
            f"quant.type={theirs[0]} quant.blocksize={theirs[1]}",
        )
    return f"the scales of {config.init_from} after {facts.get('qzo.steps', 'its')} steps"


def set_initial_(config: Config, transformer: nn.Module, scales: ScaleSet) -> None:
    """Set the live scales, which hold the base, to those of `config.init_from`, if there is one.

    Raises:
        OutputError, ModelError: there are none, or they belong to another model.
    """
    if config.init_from is None:
        return
    run = Path(config.init_from)
    tensors, facts = load_scales(run)
    check_codes(facts, frozen_fingerprint(transformer, scales), run)
    merge_changes_(scales, [(as_scales(scales, tensors, facts), 1.0)])


def as_scales(
    scales: ScaleSet, tensors: dict[str, Tensor], facts: dict[str, str]
) -> dict[str, Tensor]:
    """What `load_scales` found, as whole scales; of an exported delta these are its changes of
    `scales`, which hold the base.
    """
    return (
        expanded(scales, tensors) if facts.get("qzo.format") == provenance.DELTA_FORMAT else tensors
    )


def check_codes(facts: dict[str, str], codes: str, path: Path) -> None:
    """Raises ModelError when tuned scales belong to other codes than this base has."""
    if facts.get("qzo.codes") != codes:
        raise ModelError(
            f"{path} was tuned on {facts.get('qzo.model', 'an unknown model')}, over other codes",
            "the base model and quantization that the run was tuned on",
            "give the run's own --model and quantization settings",
        )
