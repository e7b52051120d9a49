"""What `qzo-diffuse mix` does: one set of scales from the changes of several runs, each with its
weight.
"""

from pathlib import Path
from typing import Any

from qzo_diffusion.config.files import load_config
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.errors import ConfigError
from qzo_diffusion.files import ANOTHER, check_empty
from qzo_diffusion.runs import build, provenance
from qzo_diffusion.runs.locate import locate
from qzo_diffusion.runs.tuned import apply_, load_tuned
from qzo_diffusion.train.run_folder import RunFolder


def parse_part(text: str) -> tuple[Path, float]:
    """`outputs/run=0.5` -> (Path("outputs/run"), 0.5).

    The last `=` counts, since a folder's name may hold one.
    """
    path, equals, weight = text.rpartition("=")
    try:
        if not equals or not path:
            raise ValueError
        return Path(path), float(weight)
    except ValueError:
        raise ConfigError(
            f"--run {text}", "RUN=WEIGHT, for example outputs/ink=0.7", "give each run a weight"
        ) from None


def run(parts: list[str], output_dir: Path) -> dict[str, Any]:
    """Leave `final/` with the blend, usable wherever a run is: `sample --run`, `export --run`."""
    chosen = [parse_part(text) for text in parts]
    check_empty(output_dir, ANOTHER)
    located = [locate(path) for path, _ in chosen]
    for one in located:
        if one.folder is not None:  # scales alone have no settings; codes are compared below
            one.need("style")
    config: Config = load_config(located[0].settings())
    tuned = [(load_tuned(path), weight) for path, weight in chosen]
    transformer, scales, _ = build.load_base(config, build.find_runtime(config))
    codes = apply_(transformer, scales, tuned)
    out = RunFolder.create(output_dir, ANOTHER)
    out.save_scales(
        "final",
        scales.tensors(),
        provenance.scales_metadata(config, codes) | {"qzo.mix": " ".join(parts)},
    )
    out.write_text("config.yaml", config.to_yaml())
    return {"run": str(output_dir), "runs": len(parts)}
