"""Load the base that a language model's journal is replayed over."""

from pathlib import Path

from qzo_diffusion import devices
from qzo_diffusion.config.llm import LlmConfig
from qzo_diffusion.core.journal import Journal
from qzo_diffusion.runs.llm.methods import load_base
from qzo_diffusion.runs.llm.models import choose_lm
from qzo_diffusion.runs.replay import Base, settings_of, without


def base(config: LlmConfig, run: Path) -> Base:
    """Return the language model as the run in this folder found it. Raises ModelError."""
    device = devices.choose_device(config.compute.device)
    folder, _ = choose_lm(config.model)
    dtype = devices.choose_dtype(config.compute.dtype, device)
    found = load_base(config, folder, device, dtype, run)
    facts = {"qzo.method": config.method, "qzo.task": config.task}
    keep = (lambda target: None) if found.maps is None else found.maps.keep_in
    return Base(config, found.theta, found.optimizer, found.codes, found.initial, facts, keep)


def config_of(journal: Journal, model: str | None) -> LlmConfig:
    """Return the settings in a journal's header; its task is kept for `llm evaluate`."""
    try:
        own = {name: journal.header[name] for name in ("method", "task", "lora", "data")}
    except KeyError as error:
        raise without(error) from None
    return settings_of(journal, LlmConfig, own, model)
