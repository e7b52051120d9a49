"""Record what `make demo` left: docs/images/demo.json and docs/images/demo.png, its whole grid.

    time make demo && python -m benchmarks.demo --seconds SECONDS

Seconds are those of the training and the scoring, on an idle machine, after installation; left out
where the machine was not idle."""

import argparse
import json
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.record import provenance
from qzo_diffusion.system.reading import read_json

ROOT = Path(__file__).parents[1]
OUTPUTS, IMAGES = ROOT / "outputs", ROOT / "docs" / "images"


def facts(trained: dict[str, Any], scored: dict[str, Any], seconds: float | None) -> dict[str, Any]:
    """The run's own summary and scores, without folders of this machine."""
    clip, style = scored["clip_score"], scored["style"]["similarity"]
    keys = ("base_mean", "mean", "delta", "delta_ci95")
    return {
        **{key: trained[key] for key in ("steps", "stopped", "validation_loss", "sample_chroma")},
        "sentence": scored["sentence"],
        "evaluation": {
            "scorer": scored["scorer"]["note"],
            "prompts": clip["n"],
            "clip_score": {key: clip[key] for key in keys},
            "style_similarity": {key: style[key] for key in keys},
        },
        "seconds": seconds,
        **provenance(),
        "command": "make demo",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float)
    seconds = parser.parse_args().seconds
    found = facts(
        read_json(OUTPUTS / "demo.json"), read_json(OUTPUTS / "demo" / "evaluation.json"), seconds
    )
    (IMAGES / "demo.json").write_text(json.dumps(found, indent=1) + "\n")
    Image.open(OUTPUTS / "demo" / "samples" / "grid.png").save(IMAGES / "demo.png", optimize=True)


if __name__ == "__main__":
    main()
