"""QuZO, integer codes, beside QZO and beside first order: `python -m benchmarks.quzo memory --data
FOLDER`.

The runs on SST-2 are cells of `benchmarks.llm_compare` (`run --cells 'sst2/quzo*'`), of one budget
with the other methods. `memory` measures peaks of a QuZO step, of inference, and of first-order
training of the same int8 model with fake quantization and a straight-through estimate, on the same
batch. `time` measures a step over as many plain forwards. `slopes` tells how noisy directions of
three kinds are, and `spread` how noisy the rounded probe of each code is at each eps. `style`
trains one style with both methods. `report` writes the JSON and the table in docs/quzo.md."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import quzo_steps as steps
from benchmarks import quzo_style as style
from benchmarks.llm_compare import memory
from benchmarks.llm_compare.cells import dtype_of
from benchmarks.llm_compare.methods import BATCH, BFLOAT16, METHODS, TASKS, Places
from benchmarks.record import RESULTS, put_between_markers, write_results
from benchmarks.resident import FREED_AT_ONCE
from benchmarks.smollm2 import smollm2

TABLE = ("<!-- table: python -m benchmarks.quzo report -->", "<!-- end of table -->")
FORMATS = {  # of the default -> its cells of llm_compare
    "int8": "quzo_default",
    "int4": "quzo_default_int4",
    "fp8": "quzo_default_fp8",
}
ROWS = {  # name in the table -> cells
    "int8 (the default)": "quzo_default",
    "int8, twice the steps": "quzo_default_twice",
    "int8, W8A8": "quzo_default_w8a8",
    "int4, groups of 32": "quzo_default_int4",
    "fp8": "quzo_default_fp8",
    "each code of int8, feedback of 40 steps": "quzo_int8_slow",
    "the same, for longer": "quzo_int8_long",
    "each code of int8, feedback of 20 steps": "quzo_int8",
    "each code of int8, rounding alone": "quzo_int8_plain",
    "each code of int8, W8A8, feedback of 40 steps": "quzo_w8a8",
    "each code of int4, feedback": "quzo_int4",
    "each code of int4, rounding alone": "quzo_int4_plain",
    "each code of fp8, feedback": "quzo_fp8",
    "int8, adapters (QuZO-LoRA)": "quzo_lora",
    "int8, QZO on the scales, all layers": "qzo_int8",
    "nf4, QZO on the scales": "default",
}
MEASURED = ("quzo_default", "quzo_default_int4", "quzo_default_fp8", "sgd", "adamw")


class FakeQuantLinear(nn.Module):
    """First-order training of an int8 model: an fp32 weight, rounded in the forward, straight
    through in the backward.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().float())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.detach().abs().amax(1, keepdim=True) / 127
        rounded = (self.weight.detach() / scale).round().clamp(-127, 127) * scale
        return F.linear(x, (self.weight + (rounded - self.weight).detach()).to(x.dtype), self.bias)


def first_order(optimizer: str, places: Places) -> dict[str, float]:
    """Peak of two first-order steps on the batch that `llm_compare.memory` measures, above the
    imports, in MB.
    """
    import bitsandbytes  # noqa: F401  before the first look at the memory
    from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401

    from benchmarks.resident import peak_of, resident
    from qzo_diffusion.config.defaults import set_dotted
    from qzo_diffusion.config.files import make_config, parse_override
    from qzo_diffusion.config.llm import LlmConfig
    from qzo_diffusion.llm.causal_lm import load_causal_lm
    from qzo_diffusion.llm.objectives import task_loss
    from qzo_diffusion.llm.tasks import encode
    from qzo_diffusion.quant.base import linears_to_quantize
    from qzo_diffusion.runs.llm import plan as llm_run
    from qzo_diffusion.runs.llm.batches import TextBatches

    imports = resident("VmRSS")
    settings: dict[str, Any] = {"task": "sst2", "model": str(places.model), "method": "quzo"}
    for text in [*TASKS["sst2"]["settings"], *BFLOAT16, f"data.dir={places.data / 'sst2'}"]:
        set_dotted(settings, *parse_override(text, LlmConfig))
    plan = llm_run.make_plan(make_config(settings, LlmConfig))
    lm = load_causal_lm(plan.model_folder, plan.dtype)
    weights = []
    for name, linear in list(linears_to_quantize(lm.model, plan.config.quant.skip, 1)):
        parent, _, child = name.rpartition(".")
        made = FakeQuantLinear(linear)
        weights.append(made.weight)
        setattr(lm.model.get_submodule(parent), child, made)
    batches = TextBatches(
        lm, encode(lm, plan.splits.train, plan.config.data.max_tokens), batch_size=BATCH, seed=0
    )
    stepper = (
        torch.optim.AdamW(weights) if optimizer == "adamw" else torch.optim.SGD(weights, lr=1e-6)
    )

    def steps() -> None:
        for step in range(2):
            stepper.zero_grad()
            (task_loss(lm, batches(step).micro_batches[0]).sum() / BATCH).backward()
            stepper.step()

    steps()
    return {"step_mb": round((peak_of(steps) - imports) / 1e6)}


def largest_layer_mb(places: Places) -> float:
    """The largest quantized layer's weight in fp32."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(places.model)
    return config.hidden_size * config.intermediate_size * 4 / 1e6


def measure(places: Places) -> dict[str, Any]:
    found = {}
    for name in MEASURED:  # a process each: peaks must not hide one another
        command = [
            sys.executable,
            "-m",
            "benchmarks.quzo",
            "memory",
            "--one",
            name,
            "--data",
            str(places.data),
        ]
        output = subprocess.run(
            [*command, "--model", str(places.model)],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | FREED_AT_ONCE,
        ).stdout
        found[name] = json.loads(output.splitlines()[-1])
        print(name, found[name], file=sys.stderr)
    return found


def results_by_cell(places: Places) -> dict[str, list[dict[str, Any]]]:
    """Return the results of SST-2 by cell, in the order of their seeds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((places.results / "cells" / "llm" / "sst2").glob("*.json")):
        result = json.loads(path.read_text())
        found.setdefault(result["method"], []).append(result)
    return found


def _row(name: str, result: dict[str, Any], peak: float | str) -> list[Any]:
    loss = result["validation_loss"] or {"start": float("nan"), "end": float("nan")}
    value = "diverged" if result["value"] is None else f"{result['value']:.3f}"
    passes = result["forwards"]
    if result["method"] in METHODS:
        passes = result["steps"] * METHODS[result["method"]].forwards_of_step
    return [
        name,
        result["seed"],
        result["steps"],
        f"{passes:,}",
        value,
        f"{loss['start']:.3f} -> {loss['end']:.3f}",
        round(result["processor_seconds"] / 60),
        dtype_of(result),
        peak,
    ]


def table(runs: dict[str, list[dict[str, Any]]], memory: dict[str, Any]) -> list[str]:
    """Return the lines of the table in docs/quzo.md."""
    rows = [
        _row(name, result, memory.get(cell, {}).get("memory_over_inference", ""))
        for name, cell in ROWS.items()
        for result in runs.get(cell, [])
    ]
    header = ["format, method", "seed", "steps", "forward passes of an example"]
    header += ["accuracy on 872", "held-out loss", "processor min", "in"]
    header += ["memory over inference"]
    return [
        "| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows]
    ]


def _figures(runs: dict[str, list[dict[str, Any]]], measured: dict[str, Any]) -> dict[str, Any]:
    values = {cell: [result["value"] for result in results] for cell, results in runs.items()}
    seeds = {kind: values[cell] for kind, cell in FORMATS.items() if cell in values}
    rows = {name: values[cell] for name, cell in ROWS.items() if cell in values}
    figures: dict[str, Any] = {
        "sst2": {kind: round(statistics.fmean(found), 4) for kind, found in seeds.items()},
        "sst2_seeds": seeds,
        "sst2_rows": {
            name: row for name, row in rows.items() if ROWS[name] not in FORMATS.values()
        },
    }
    ends = [
        runs[cell][0]["validation_loss"]["end"]
        for cell in ("quzo_default", "quzo_default_twice")
        if cell in runs
    ]
    if len(ends) == 2:
        figures["longer_not_worse"] = ends[1] <= ends[0]
    if memory := measured.get("memory", {}):
        peak = memory["quzo_default"]["step_mb"]
        figures["memory_ratio_to_first_order"] = round(memory["sgd"]["step_mb"] / peak, 3)
        over = (memory[cell]["memory_over_inference"] for cell in FORMATS.values())
        figures["memory_over_inference"] = max(over)
    if "step_over_forwards" in measured:
        by_cell = measured["step_over_forwards"]
        figures["step_over_forwards"] = by_cell["quzo_default"]
        figures["step_over_forwards_of_each_code"] = by_cell["quzo_int8_slow"]
    if "style" in measured:
        figures["style_share_of_qzo"] = measured["style"]["share"]
    return figures


def report(places: Places, document: Path) -> Path:
    runs, earlier = results_by_cell(places), places.results / "quzo_measured.json"
    measured: dict[str, Any] = json.loads(earlier.read_text()) if earlier.exists() else {}
    lines = table(runs, measured.get("memory", {}))
    text = document.read_text(encoding="utf-8")
    document.write_text(
        put_between_markers(text, "\n".join(["", *lines, ""]), *TABLE), encoding="utf-8"
    )
    figures = _figures(runs, measured) | {"largest_layer_mb": round(largest_layer_mb(places), 2)}
    return write_results("quzo", figures | {"measured": measured}, places.results)


MEASURES: dict[str, Callable[[Places], Any]] = {
    "memory": measure,
    "time": steps.over_forwards,
    "slopes": steps.slopes,
    "spread": steps.spread,
    "style": style.share_of_qzo,
}
KEPT_AS = {"time": "step_over_forwards"}
KEPT = ("memory", "step_over_forwards", "slopes", "spread", "style")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=[*MEASURES, "report"])
    parser.add_argument(
        "--data", type=Path, default=Path("."), help="the folder of the tasks' data"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--model",
        type=Path,
        help="a transformers folder; default SmolLM2, converted where it isn't there yet",
    )
    parser.add_argument(
        "--one", choices=MEASURED, help="memory of one method, printed (used by the whole)"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of `time`; float32 where the processor emulates bfloat16",
    )
    parser.add_argument("--document", type=Path, default=Path("docs/quzo.md"))
    options = parser.parse_args()
    if options.dtype and options.verb != "time":
        parser.error("--dtype is for time")
    model = options.model or smollm2()
    places = Places(options.results, Path(), options.data, model, dtype=options.dtype)
    if options.verb == "report":
        print(report(places, options.document))
    elif options.one in ("sgd", "adamw"):
        print(json.dumps(first_order(options.one, places)))
    elif options.one:
        print(json.dumps(memory.measure(options.one, places)))
    else:
        path = places.results / "quzo_measured.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        known = {key: known[key] for key in KEPT if key in known}
        known[KEPT_AS.get(options.verb, options.verb)] = MEASURES[options.verb](places)
        print(write_results("quzo_measured", known, places.results))


if __name__ == "__main__":
    main()
