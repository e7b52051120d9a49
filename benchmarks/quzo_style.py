"""How much of QZO's gain on a style QuZO keeps, for `python -m benchmarks.quzo style`: the embedded
model on the images of `make demo`, with equal steps, seed and settings, by `qzo-diffuse train` and
`evaluate`."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.llm_compare.methods import Places
from qzo_diffusion.resources import PACKAGE
from qzo_diffusion.system.reading import read_json

STYLE = PACKAGE / "demo_images" / "fluent_mono" / "train"
STEPS = 600
SETTINGS = ("train.patience=null", "sample.every=0")


def command(*arguments: str) -> str:
    line = [sys.executable, "-m", "qzo_diffusion.cli", *arguments]
    return subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout


def trained(method: str, folder: Path, steps: int) -> dict[str, Any]:
    """Held-out loss before and after, its fall, and the change of style and content."""
    run = folder / method
    given = ["--model", "tiny", "--style-dir", str(STYLE), "--output-dir", str(run)]
    told = json.loads(
        command("train", "--method", method, *given, "--max-steps", str(steps), "--json", *SETTINGS)
    )
    command("evaluate", "--run", str(run))
    scores = read_json(run / "evaluation.json")
    loss = told["validation_loss"]
    parts = {"style": scores["style"]["similarity"], "content": scores["clip_score"]}
    of_parts = {name: {k: part[k] for k in ("delta", "delta_ci95")} for name, part in parts.items()}
    return {"loss": loss, "gain": loss["start"] - loss["end"], **of_parts}


def share_of_qzo(_: Places) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        found = {method: trained(method, Path(place), STEPS) for method in ("qzo", "quzo")}
    share = found["quzo"]["gain"] / found["qzo"]["gain"]
    return {"share": round(share, 4), "steps": STEPS, **found}
