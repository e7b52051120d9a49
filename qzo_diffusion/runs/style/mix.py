"""Mix runs for `qzo-diffuse mix`: add the changes of several runs, each with its weight."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qzo_diffusion.config.arguments import unusual
from qzo_diffusion.config.files import load_config, with_whole_paths
from qzo_diffusion.config.style import Config
from qzo_diffusion.runs import provenance
from qzo_diffusion.runs.locate import locate
from qzo_diffusion.runs.style import pipeline
from qzo_diffusion.runs.tuned import apply_, load_tuned
from qzo_diffusion.system.console import report
from qzo_diffusion.system.files import ANOTHER, check_empty, unfinished
from qzo_diffusion.train.run_folder import RunFolder


def run(chosen: Sequence[tuple[Path, float]], output_dir: Path) -> dict[str, Any]:
    """Write `final/` with the sum of each run's change times its weight.

    The result can be used like a run: `sample --run`, `export --run`.
    """
    check_empty(output_dir, ANOTHER)
    located = [locate(path) for path, _ in chosen]
    for one in located:
        if one.folder is not None:  # scales alone have no settings; their codes are compared below
            one.need("style")
    config: Config = load_config(located[0].settings())
    tuned = [(load_tuned(path), weight) for path, weight in chosen]
    for path, weight in chosen:
        if warning := unusual(weight, f"the weight of {path},"):
            report(warning)
    transformer, scales = pipeline.load_scales(config, pipeline.find_runtime(config))
    codes = apply_(transformer, scales, tuned)
    parts = " ".join(f"{path}={weight:g}" for path, weight in chosen)
    out = RunFolder.create(output_dir, ANOTHER)
    metadata = provenance.scales_metadata(config, codes) | {"qzo.mix": parts}
    with unfinished(output_dir, ("config.yaml", "final")):
        out.write_text("config.yaml", with_whole_paths(config).to_yaml())
        out.save_scales("final", scales.tensors(), metadata)
    return {"run": str(output_dir), "runs": len(chosen)}
