"""What `qzo-diffuse mix` does: one set of scales from the changes of several runs, each with its weight."""

from pathlib import Path
from typing import Any

from torch import Tensor

from qzo_diffusion import build, provenance
from qzo_diffusion.config import Config, load_config
from qzo_diffusion.core.blend import blend_
from qzo_diffusion.core.delta import expanded
from qzo_diffusion.core.errors import ConfigError, ModelError
from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.quant.load import frozen_fingerprint
from qzo_diffusion.train.run_folder import ANOTHER, RunFolder, check_empty, load_scales, settings_file


def parse_part(text: str) -> tuple[Path, float]:
    """`outputs/run=0.5` -> (Path("outputs/run"), 0.5). The last `=` counts, since a folder's name may hold one."""
    path, equals, weight = text.rpartition("=")
    try:
        if not equals or not path:
            raise ValueError
        return Path(path), float(weight)
    except ValueError:
        raise ConfigError(f"--run {text}", "RUN=WEIGHT, for example outputs/ink=0.7", "give each run a weight") from None


def run(parts: list[str], output_dir: Path) -> dict[str, Any]:
    """Leave `final/` with the blend, usable wherever a run is: `sample --run`, `export --run`."""
    chosen = [parse_part(text) for text in parts]
    check_empty(output_dir, ANOTHER)
    config: Config = load_config(settings_file(chosen[0][0]))
    tuned = [(load_scales(path), weight) for path, weight in chosen]
    transformer, scales, _ = build.load_base(config, build.find_place(config))
    codes = frozen_fingerprint(transformer, scales)
    for (path, _), ((_, facts), _) in zip(chosen, tuned, strict=True):
        check_codes(facts, codes, path)
    blend_(scales, [(as_scales(scales, *found), weight) for found, weight in tuned])
    out = RunFolder.create(output_dir, ANOTHER)
    out.save_scales("final", scales.tensors(), provenance.scales_metadata(config, codes) | {"qzo.mix": " ".join(parts)})
    out.write_text("config.yaml", config.to_yaml())
    return {"run": str(output_dir), "runs": len(parts)}


def as_scales(scales: ScaleSet, tensors: dict[str, Tensor], facts: dict[str, str]) -> dict[str, Tensor]:
    """What `load_scales` found, as whole scales; of an exported delta these are its changes of `scales`, which hold the base."""
    return expanded(scales, tensors) if facts.get("qzo.format") == provenance.DELTA_FORMAT else tensors


def check_codes(facts: dict[str, str], codes: str, path: Path) -> None:
    """Raises ModelError when tuned scales belong to other codes than this base has."""
    if facts.get("qzo.codes") != codes:
        raise ModelError(
            f"{path} was tuned on {facts.get('qzo.model', 'an unknown model')}, over other codes",
            "the base model and quantization that the run was tuned on",
            "give the run's own --model and quantization settings",
        )
