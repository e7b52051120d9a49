"""Load the tuned scales of a run, check them against a base, and apply them.

Every verb that reads a run, a checkpoint, a mix or a delta uses this file; so does `train
--init-from RUN`, which begins with the scales of another run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from qzo_diffusion.config.style import Config
from qzo_diffusion.core.delta import expanded
from qzo_diffusion.core.errors import ConfigError, ModelError
from qzo_diffusion.core.merge import merge_changes_
from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.quant.load import frozen_fingerprint
from qzo_diffusion.runs import provenance
from qzo_diffusion.runs.former import remedy_for
from qzo_diffusion.runs.locate import locate
from qzo_diffusion.system.files import COMPLETE, SCALES, check_folder
from qzo_diffusion.train.run_folder import load_tensors


@dataclass(frozen=True)
class Tuned:
    """Tuned scales as a run left them, or the changes of a delta.

    Attributes:
        path: their source, as the user gave it.
        tensors: scales or changes by layer.
        facts: metadata of the file, `qzo.*`.
    """

    path: Path
    tensors: dict[str, Tensor]
    facts: dict[str, str]

    def check(self, codes: str) -> None:
        """Check that they were tuned over a base with these codes. Raises ModelError."""
        if self.facts.get("qzo.codes") != codes:
            model = self.facts.get("qzo.model", "an unknown model")
            raise ModelError(
                f"{self.path} was tuned on {model}, over other codes",
                "the base model and quantization that the run was tuned on",
                remedy_for(self.facts.get("qzo.codes"), codes)
                or "give the run's own --model and quantization settings",
            )

    def over(self, base: ScaleSet) -> dict[str, Tensor]:
        """Return whole scales by layer. Those of a delta follow from `base`, which holds the
        base's.
        """
        is_delta = self.facts.get("qzo.format") == provenance.DELTA_FORMAT
        return expanded(base, self.tensors) if is_delta else self.tensors


def load_tuned(path: Path) -> Tuned:
    """Load the scales of a run, a checkpoint, a delta, or a safetensors file.

    Raises:
        OutputError: there are no tuned scales, or they are damaged or not finished.
    """
    return Tuned(path, *load_scales(path))


def load_scales(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata of `load_tuned`."""
    if path.is_file():
        if path.name == SCALES and (path.parent / COMPLETE).is_file():
            check_folder(path.parent)
        return load_tensors(path)
    folder = locate(path).scales()
    check_folder(folder)
    return load_tensors(folder / SCALES)


def apply_(model: nn.Module, scales: ScaleSet, parts: Sequence[tuple[Tuned, float]]) -> str:
    """Move the live scales, which hold the base, by weighted changes. Weight 1 gives the tuned
    model.

    Returns the hash of the base's codes.

    Raises:
        ModelError: scales were tuned over other codes.
    """
    codes = frozen_fingerprint(model, scales)
    for tuned, _ in parts:
        tuned.check(codes)
    merge_changes_(scales, [(tuned.over(scales), weight) for tuned, weight in parts])
    return codes


def described(config: Config) -> str:
    """Describe the start of a run in one line, after all checks that need no model.

    Raises:
        OutputError: there are no tuned scales at `init_from`, or they are damaged.
        ConfigError: they were tuned over another quantization.
    """
    facts = load_tuned(Path(config.init_from or "")).facts
    theirs = facts.get("qzo.quant_type"), facts.get("qzo.blocksize")
    ours = config.quant.type, str(config.quant.blocksize)
    if theirs != ours:
        raise ConfigError(
            f"init_from {config.init_from}, tuned over {theirs[0]} in blocks of {theirs[1]}",
            f"a run over {ours[0]} in blocks of {ours[1]}, as this one",
            f"quant.type={theirs[0]} quant.blocksize={theirs[1]}",
        )
    seed, again = config.train.seed, ""
    if facts.get("qzo.seed") == str(seed):
        again = f"; both have the seed {seed}, and draw the same noise and directions: see --seed"
    return f"the scales of {config.init_from} after {facts.get('qzo.steps', 'its')} steps{again}"


def set_initial_(config: Config, transformer: nn.Module, scales: ScaleSet) -> None:
    """Set the live scales, which hold the base, to those of `config.init_from`, if there is one.

    Raises:
        OutputError, ModelError: there are none, or they belong to another model.
    """
    if config.init_from is None:
        return
    apply_(transformer, scales, [(load_tuned(Path(config.init_from)), 1.0)])
