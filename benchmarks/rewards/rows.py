"""The rows that are runs: what the reward becomes on prompts that were not trained, and what the
content does."""

import argparse
import math
from typing import Any

from benchmarks.rewards.runs import evaluated, seconds_of, trained
from qzo_diffusion.runs.style.natural_order import natural_key
from qzo_diffusion.runs.style.scoring import images_in, opened

CONTENT = "clip_score"


def compressibility(options: argparse.Namespace) -> dict[str, Any]:
    """Bytes of a picture as JPEG over those of the base's, as a mean over prompts of logarithms."""
    run = trained(options, "compressibility", ["compressibility"])
    found = evaluated(run)
    smaller, content = found["each"]["compressibility"], found["second"]
    low, high = smaller["delta_ci95"]
    return {
        "bytes_ratio": math.exp(-smaller["delta"]),
        "bytes_ratio_ci95": [math.exp(-high), math.exp(-low)],
        "content_delta": content["delta"],
        "content_delta_ci95": content["delta_ci95"],
        "content": content["name"],
        "prompts": len(found["prompts"]),
        "steps": found["step"],
        "seconds": seconds_of(run),
    }


def style(options: argparse.Namespace) -> dict[str, Any]:
    """Similarity to a folder's pictures, with content as a second reward."""
    if options.style_dir is None:
        raise SystemExit("the row style needs --style-dir DIR, pictures that the base never saw")
    name = f"style:{options.style_dir.absolute()}"
    run = trained(options, "style", [name, CONTENT])
    found = evaluated(run)
    near, content = found["each"][name], found["each"][CONTENT]
    pictures, _ = opened(sorted(images_in(options.style_dir), key=natural_key), options.style_dir)
    return {
        "style_delta": near["delta"],
        "style_delta_ci95": near["delta_ci95"],
        "content_delta": content["delta"],
        "content_delta_ci95": content["delta_ci95"],
        "style_pictures": len(pictures),
        "prompts": len(found["prompts"]),
        "steps": found["step"],
        "seconds": seconds_of(run),
    }
