"""Check that every family of picture models is called, trained and exported as its own pipeline.

python -m benchmarks.families make NAME DIR    # writes a small random pipeline of a family
python -m benchmarks.families [NAME ...]       # every check, into results/families.json
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.families import equality, runs, small
from benchmarks.families.results import record
from qzo_diffusion.diffusion.families import registry

STEPS = 50
CLEAN = 2e-5  # a few roundings in fp32 of numbers up to 15
# Each weight is off by up to 2^-9 of itself; the errors of a few blocks add up like noise.
BF16 = 0.05
SAME = 1e-5  # the same numbers through the same products, where a layer's place may differ
DEFAULT = ("train.micro_batch_size=8",)
FIRST_ORDER = ("method=fo-scales", "data.batch_size=4")


def check(name: str, folder: Path) -> dict[str, Any]:
    """Return all booleans of a family and the figures behind them."""
    model = small.write(name, folder / "model")
    family = registry.by_name(name)
    denoiser, calls = equality.plain_calls(model, family, torch.float64)
    wrong = [
        difference
        for call in calls
        for difference in equality.differences(
            call, equality.our_call(model, family, denoiser, folder / "cache", call)[0]
        )
    ]
    errors = [equality.clean_from_one_step(model, family, level) for level in (0.1, 0.5, 0.9)]
    default = runs.train(model, folder / "default", "--max-steps", str(STEPS), *DEFAULT)
    exact = runs.train(model, folder / "exact", "--max-steps", str(STEPS), *FIRST_ORDER)
    losses = {run.name: runs.held_out_losses(run) for run in (default, exact)}
    exported = runs.export_errors(model, default)
    return {
        "forward_equal": not wrong,
        "scheduler_identity": max(errors) < CLEAN,
        "loss_falls_default": losses["default"][1] < losses["default"][0],
        "loss_falls_first_order": losses["exact"][1] < losses["exact"][0],
        "export_equal": exported["nf4"] <= SAME and exported["bf16"] <= BF16,
        "figures": {
            "differences": wrong,
            "scheduler_errors": errors,
            "held_out_losses": losses,
            "export_errors": exported,
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="make NAME DIR, or NAME ...")
    words = parser.parse_args(arguments).words
    if words[:1] == ["make"]:
        if len(words) != 3 or words[1] not in small.NAMES:
            parser.error(f"make NAME DIR, where NAME is one of {', '.join(small.NAMES)}")
        print(small.write(words[1], Path(words[2])))
        return
    if unknown := set(words) - set(small.NAMES):
        parser.error(f"no family {unknown.pop()}; there are {', '.join(small.NAMES)}")
    for name in words or small.NAMES:
        with tempfile.TemporaryDirectory() as folder:
            found = check(name, Path(folder))
        record("families", name, found)  # after each, so that a stop loses one
        print(name, {key: value for key, value in found.items() if key != "figures"})


if __name__ == "__main__":
    main()
