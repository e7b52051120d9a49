"""Record where a run's files come from, and check that a journal fits the base that it is replayed
over.
"""

import hashlib
import platform
import subprocess
import sys
from importlib import metadata
from typing import Any

import torch

from qzo_diffusion import __version__, devices, resources
from qzo_diffusion.config.sections import RunConfig
from qzo_diffusion.core.errors import JournalError
from qzo_diffusion.core.journal import Journal
from qzo_diffusion.runs.former import remedy_for
from qzo_diffusion.runs.publish import published_model
from qzo_diffusion.runs.subspace import file_hash

# How signs are drawn and applied. 1 drew those of rows layer by layer; 2 added every direction to θ
# in turn.
JOURNAL_FORMAT = 3
DELTA_FORMAT = "delta/1"


def config_hash(config: RunConfig) -> str:
    return hashlib.blake2b(config.to_yaml().encode(), digest_size=16).hexdigest()


_RESOLVED = (
    "codes",
    "initial_scales",
    "directions",
    "parametrization",
    "layers",
    "units",
    "regions",
    "examples",
    "optimizer",
    "state_bits",
    "feedback",
    "normalize",
    "prior",
)


def check_journal_fits(journal: Journal, header: dict[str, Any]) -> None:
    """Check that the journal was written over this base; its steps would otherwise change other
    numbers.

    Raises:
        JournalError: it was not.
    """
    if journal.header.get("format") != JOURNAL_FORMAT:
        raise JournalError(
            f"a journal whose directions are drawn as in format {journal.header.get('format')}",
            f"format {JOURNAL_FORMAT}",
            "use the version that wrote it",
        )
    for key in _RESOLVED:
        if journal.header.get(key) != header.get(key):
            raise JournalError(
                f"a journal with {key} = {journal.header.get(key)!r}",
                f"{header.get(key)!r}, as the model and the settings have it here",
                remedy_for(journal.header.get("codes"), header.get("codes"))
                or "give the model, quantization and settings that the journal was written with",
            )
    if journal.header.get("subspace") != header.get("subspace"):
        own = journal.header.get("subspace_file")
        raise JournalError(
            f"a journal of a run with qzo.subspace={own or 'null'}",
            "the same file, with the same content" if own else "no file of directions",
            "give the file that the run began with: qzo.subspace=FILE"
            if own
            else "give qzo.subspace=null",
        )


def scales_metadata(config: RunConfig, codes: str) -> dict[str, str]:
    """Return the facts that are needed to apply tuned scales to a base again."""
    return {
        "qzo.format": "scales/1",
        "qzo.model": config.model,
        "qzo.codes": codes,
        "qzo.quant_type": config.quant.type,
        "qzo.blocksize": str(config.quant.blocksize),
        "qzo.seed": str(config.train.seed),
        "qzo.version": __version__,
    }


def environment(model: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return versions, hardware and revision, for environment.json."""
    packages = (
        "torch",
        "diffusers",
        "transformers",
        "bitsandbytes",
        "accelerate",
        "numpy",
        "safetensors",
    )
    return {
        "qzo_diffusion": __version__,
        "git_revision": _git_revision(),
        "model": published_model(model),
        "device": str(device),
        "device_name": devices.device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None  # bitsandbytes may be missing


def _git_revision() -> str | None:
    command = ["git", "-C", str(resources.PACKAGE), "rev-parse", "HEAD"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=5
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def journal_header(config: RunConfig, batch_size: int, codes: str, scales: str) -> dict[str, Any]:
    """Return the header that a replay from the base model alone needs."""
    return {
        "format": JOURNAL_FORMAT,
        "model": config.model,
        "codes": codes,
        "initial_scales": scales,
        "config": config_hash(config),
        "seed": config.train.seed,
        "directions": config.qzo.directions,
        "num_directions": config.qzo.num_directions,
        "parametrization": config.qzo.parametrization,
        "units": config.qzo.units,
        "layers": config.qzo.layers,
        "regions": config.qzo.regions,
        # each with a direction of its own
        "examples": batch_size * config.qzo.num_directions if config.qzo.per_example else None,
        "optimizer": config.train.optimizer,
        # which journals did not name at first
        "state_bits": None if config.train.state_bits == 32 else config.train.state_bits,
        "feedback": [config.train.feedback_decay, config.train.feedback_steps]
        if config.train.optimizer == "feedback"
        else None,
        # a step's own rms is already in its scalars
        "normalize": "running" if config.qzo.normalize == "running" else None,
        "prior": None if config.prior.off else [config.prior.decay, config.prior.bound],
        "quant": config.quant.model_dump(),
        "dtype": config.compute.dtype,
    } | _named_if_given(config)


def _named_if_given(config: RunConfig) -> dict[str, Any]:
    own: dict[str, Any] = {"method": "quzo"} if config.trains_codes else {}
    if config.qzo.subspace is None:
        return own
    named = config.qzo.subspace
    return own | {"subspace": file_hash(named), "subspace_file": named}
