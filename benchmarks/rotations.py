"""Maps of a language model's inputs in front of 4 bits: SmolLM2's perplexity, and QZO on SST-2.

    python -m benchmarks.rotations w4a4 --data FOLDER
    python -m benchmarks.rotations w4a16 --data FOLDER
        perplexity with each `quant.transform`, on XQuAD's paragraphs; maps are learned on BoolQ's
        passages
    python -m benchmarks.rotations sst2 --data FOLDER
        200 steps of QZO at W4A4

FOLDER holds xquad.en.json, superglue_BoolQ/val.jsonl and sst2/. Finished cells are kept in --cache
and skipped; `python -m benchmarks.comparison report` writes the table of docs/comparison.md."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.record import RESULTS, update_results
from benchmarks.smollm2 import smollm2
from qzo_diffusion.config.files import make_config
from qzo_diffusion.config.llm import LlmConfig
from qzo_diffusion.llm.causal_lm import CausalLm
from qzo_diffusion.runs.llm.methods import load_base
from qzo_diffusion.system.reading import read_json

TRANSFORMS = ("none", "hadamard", "kurtail", "flatquant")
LEARNED = ("kurtail", "flatquant")
INPUTS = {"w4a4": "int4", "w4a16": "float"}
WINDOW = 512  # tokens of a text whose losses are averaged
PASSAGES = 200  # of BoolQ
Cells = dict[str, dict[str, Any]]


def quant(transform: str, width: str, cache: Path) -> dict[str, Any]:
    """Settings of `quant`: int4 in blocks of 64, inputs with a scale for each token."""
    settings = {"backend": "intgrid", "type": "int4", "activations": INPUTS[width]}
    text = {"calibration": str(cache / "calibration.txt")} if transform in LEARNED else {}
    return settings | {"transform": transform} | text


def paragraphs(data: Path) -> str:
    articles = json.loads((data / "xquad.en.json").read_text("utf-8"))["data"]
    return "\n\n".join(one["context"] for article in articles for one in article["paragraphs"])


def write_calibration(data: Path, cache: Path) -> None:
    lines = (data / "superglue_BoolQ" / "val.jsonl").read_text("utf-8").splitlines()
    text = "\n\n".join(json.loads(line)["passage"] for line in lines[:PASSAGES])
    cache.mkdir(parents=True, exist_ok=True)
    file = cache / "calibration.txt"
    if not file.exists() or file.read_text("utf-8") != text:
        file.write_text(text, "utf-8")


@torch.no_grad()
def perplexity(lm: CausalLm, text: str, windows: int) -> float:
    """exp of the mean loss of a token behind the first, in windows of `WINDOW` tokens."""
    ids = torch.tensor(lm.encode(text)[: windows * WINDOW]).view(windows, WINDOW)
    hidden = lm.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    losses = [
        F.cross_entropy(lm.head(states[:-1]).float(), tokens[1:], reduction="none")
        for states, tokens in zip(hidden, ids, strict=True)
    ]
    return float(torch.cat(losses).mean().exp())


def of_width(width: str, transform: str, options: argparse.Namespace) -> float:
    settings = {"model": str(options.model), "quant": quant(transform, width, options.cache)}
    config = make_config(settings, LlmConfig)
    dtype = getattr(torch, options.dtype)
    base = load_base(config, options.model, torch.device("cpu"), dtype)
    return round(perplexity(base.lm, paragraphs(options.data), options.windows), 2)


def of_sst2(transform: str, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of a run of QZO; one that was stopped goes on."""
    folder = options.cache / f"sst2-{transform}"
    settings = [f"quant.{k}={v}" for k, v in quant(transform, "w4a4", options.cache).items()]
    settings += [f"data.{name}_examples=200" for name in ("validation", "test")]
    settings += ["data.max_tokens=64", f"compute.dtype={options.dtype}"]
    settings += [f"train.max_steps={options.steps}", "train.checkpoint_every=20"]
    goes_on = (folder / "metrics.jsonl").exists()
    where = ["--resume" if goes_on else "--output-dir", str(folder)]
    model = ["--model", str(options.model), "--data-dir", str(options.data / "sst2")]
    command = [sys.executable, "-m", "qzo_diffusion.cli", "llm", "train", "--task", "sst2"]
    before = os.times()
    said = subprocess.run(
        [*command, *model, *settings, *where, "--json"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    after, results = os.times(), json.loads(said)
    spent = after.children_user - before.children_user
    return {
        "accuracy": results["accuracy"],
        "validation_loss": results["validation_loss"],
        "steps": results["steps"],
    } | ({} if goes_on else {"processor_seconds": round(spent)})


VERBS: Mapping[str, Callable[[str, argparse.Namespace], Any]] = {
    "w4a4": partial(of_width, "w4a4"),
    "w4a16": partial(of_width, "w4a16"),
    "sst2": of_sst2,
}


def figures(recorded: Cells, cells: Cells) -> dict[str, Any]:
    """The keys of comparison.json, from what is recorded and from the cells that are finished."""
    both = {name: recorded.get(name, {}) | cells.get(name, {}) for name in TRANSFORMS}
    rows = {name: row for name, row in both.items() if row}
    measured = {name: row["w4a4"] for name, row in rows.items() if "w4a4" in row}
    return {"perplexity_w4a4": measured, "rotations": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=list(VERBS))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="a transformers folder; default SmolLM2")
    parser.add_argument("--windows", type=int, default=4, help=f"of {WINDOW} tokens")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--transforms", default=",".join(TRANSFORMS), help="parted by commas")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache/qzo_diffusion/rotations"
    )
    options = parser.parse_args()
    options.model = options.model or smollm2()
    write_calibration(options.data, options.cache)
    file = options.cache / "cells.json"
    cells: Cells = json.loads(file.read_text()) if file.exists() else {}
    for transform in options.transforms.split(","):
        if options.verb not in (row := cells.setdefault(transform, {})):
            row[options.verb] = VERBS[options.verb](transform, options)
            print(transform, row, file=sys.stderr, flush=True)
            file.write_text(json.dumps(cells, indent=1))
        known = options.results / "comparison.json"
        recorded = read_json(known).get("rotations", {}) if known.exists() else {}
        found, part = figures(recorded, cells), f"rotations {options.verb}"
        update_results("comparison", part, found, {"dtype": options.dtype}, options.results)


if __name__ == "__main__":
    main()
