"""Load the base that a journal of pictures is replayed over."""

from qzo_diffusion.config.style import Config
from qzo_diffusion.core.journal import Journal
from qzo_diffusion.runs import build
from qzo_diffusion.runs.replay import Base, settings_of
from qzo_diffusion.runs.style import pipeline
from qzo_diffusion.runs.tuned import set_initial_


def base(config: Config) -> Base:
    """Return the pipeline's transformer, with the scales that the run began with. Raises
    ModelError.
    """
    transformer, scales, theta = pipeline.load_base(config, pipeline.find_runtime(config))
    set_initial_(config, transformer, scales)
    codes, initial = build.fingerprints(transformer, scales)
    return Base(config, theta, build.optimizer(config), codes, initial, {})


def config_of(
    journal: Journal,
    model: str | None,
    init_from: str | None = None,
    transformer: str | None = None,
) -> Config:
    """Return the settings in a journal's header, or those that are given in their place. All others
    have defaults and do not matter for a replay.
    """
    each_code = journal.header.get("parametrization") == "codes"
    method = journal.header.get("method", "quzo" if each_code else "qzo")
    return settings_of(
        journal,
        Config,
        {
            "method": method,
            "init_from": init_from or journal.header.get("init_from"),
            "transformer": transformer or journal.header.get("transformer"),
            "family": journal.header.get("family"),
        },
        model,
    )
