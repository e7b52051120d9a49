"""QuZO, codes trained by stochastic rounding, beside QZO and beside first order: `python -m
benchmarks.quzo memory --data FOLDER`.

The runs on SST-2 are cells of `benchmarks.llm_compare` (`run --cells 'sst2/quzo*'`), of one budget
with the other methods. `memory` measures peaks of a QuZO step, of inference, and of first-order
training of the same int8 model with fake quantization and a straight-through estimate, on the same
batch. `spread` tells how noisy the rounded probe is at each eps. `report` writes the JSON and the
table in docs/quzo.md."""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.llm_compare import memory
from benchmarks.llm_compare.methods import BATCH, BFLOAT16, METHODS, TASKS, Places
from benchmarks.record import RESULTS, put_between_markers, write_results
from benchmarks.smollm2 import smollm2

TABLE = ("<!-- table: python -m benchmarks.quzo report -->", "<!-- end of table -->")
FORMATS = {  # cells of llm_compare by the name of their row
    "int8, feedback of 40 steps (the default)": "quzo_int8_slow",
    "the same, for longer": "quzo_int8_long",
    "int8, feedback of 20 steps": "quzo_int8",
    "int8, rounding alone": "quzo_int8_plain",
    "int8, W8A8, feedback of 40 steps": "quzo_w8a8",
    "int4, feedback": "quzo_int4",
    "int4, rounding alone": "quzo_int4_plain",
    "fp8, feedback": "quzo_fp8",
    "int8, adapters (QuZO-LoRA)": "quzo_lora",
    "int8, QZO on the scales": "qzo_int8",
    "nf4, QZO on the scales": "default",
}
MEASURED = ("quzo_int8", "quzo_int4", "quzo_fp8", "sgd", "adamw")
EPS = (0.1, 0.25, 0.5, 1.0, 2.0)


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
            [*command, "--model", str(places.model)], check=True, capture_output=True, text=True
        ).stdout
        found[name] = json.loads(output.splitlines()[-1])
        print(name, found[name], file=sys.stderr)
    return found


def spread(places: Places, directions: int = 4) -> dict[str, Any]:
    """Rounded probes beside those in floating point, by eps: variance of p / eps, and of the slope
    along independent directions.
    """
    from qzo_diffusion.config.defaults import set_dotted
    from qzo_diffusion.config.files import make_config, parse_override
    from qzo_diffusion.config.llm import LlmConfig
    from qzo_diffusion.core.noise import Direction
    from qzo_diffusion.core.probing import Probing
    from qzo_diffusion.core.quzo import Codes
    from qzo_diffusion.core.spsa import probe
    from qzo_diffusion.llm.objectives import task_loss
    from qzo_diffusion.llm.tasks import encode
    from qzo_diffusion.quant.load import find_codes
    from qzo_diffusion.runs.llm import plan as llm_run
    from qzo_diffusion.runs.llm.batches import TextBatches
    from qzo_diffusion.runs.llm.methods import load_base

    settings: dict[str, Any] = {"task": "sst2", "model": str(places.model), "method": "quzo"}
    for text in [
        *TASKS["sst2"]["settings"],
        *METHODS["quzo_int8"].settings,
        f"data.dir={places.data / 'sst2'}",
    ]:
        set_dotted(settings, *parse_override(text, LlmConfig))
    plan = llm_run.make_plan(make_config(settings, LlmConfig))
    base = load_base(plan.config, plan.model_folder, plan.device, plan.dtype)
    encoded = encode(base.lm, plan.splits.train, 64)
    step_batch = TextBatches(base.lm, encoded, batch_size=BATCH, seed=0)(0)
    scales, grids = find_codes(base.lm.model)
    rows: dict[str, Any] = {}
    for kind in ("codes", "float"):
        theta = Codes(scales, grids, probe=kind)  # type: ignore[arg-type]
        for eps in EPS:
            name = next(iter(scales))
            view = theta.perturbed(Direction(0, 0), eps)
            assert view is not None
            shown = view([name])[name]
            shift = (shown if shown.is_floating_point() else grids[name].codes(shown)) - grids[
                name
            ].codes(scales[name])
            slopes = [
                probe(
                    lambda one: task_loss(base.lm, one), step_batch, theta, Probing(1, eps), index
                ).directional_derivative[0]
                for index in range(directions)
            ]
            rows[f"{kind}, eps {eps}"] = {
                "variance_of_probe": round(float((shift / eps).square().mean()), 3),
                "slope_rms": round(statistics.fmean(slope**2 for slope in slopes) ** 0.5, 4),
            }
            print(kind, eps, rows[f"{kind}, eps {eps}"], file=sys.stderr)
    return rows


def report(places: Places, document: Path) -> Path:
    runs: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((places.results / "cells" / "llm" / "sst2").glob("*.json")):
        result = json.loads(path.read_text())
        runs.setdefault(result["method"], []).append(result)
    earlier = places.results / "quzo_measured.json"
    measured: dict[str, Any] = json.loads(earlier.read_text()) if earlier.exists() else {}
    memory = measured.get("memory", {})
    rows, accuracy = [], {}
    for name, cell in FORMATS.items():
        for result in runs.get(cell, []):
            loss = result["validation_loss"] or {"start": float("nan"), "end": float("nan")}
            peak = memory.get(cell, {}).get("memory_over_inference", "")
            row = [
                name,
                result["seed"],
                result["steps"],
                f"{result['value']:.3f}" if result["value"] is not None else "diverged",
            ]
            rows.append(
                [
                    *row,
                    f"{loss['start']:.3f} -> {loss['end']:.3f}",
                    round(result["processor_seconds"] / 60),
                    peak,
                ]
            )
            accuracy.setdefault(name, []).append(result["value"])
    header = [
        "format, method",
        "seed",
        "steps of 16",
        "accuracy on 872",
        "held-out loss",
        "processor min",
        "memory over inference",
    ]
    lines = [
        "| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows]
    ]
    text = document.read_text(encoding="utf-8")
    document.write_text(
        put_between_markers(text, "\n".join(["", *lines, ""]), *TABLE), encoding="utf-8"
    )
    figures: dict[str, Any] = {
        "sst2": {
            name: values[0] if len(values) == 1 else values for name, values in accuracy.items()
        }
    }
    if memory:
        ours = memory["quzo_int8"]
        ratios = {
            name: round(memory[name]["step_mb"] / ours["step_mb"], 3) for name in ("sgd", "adamw")
        }
        figures["memory_ratio_to_first_order"] = ratios
        figures["memory_over_inference"] = max(
            memory[f"quzo_{kind}"]["memory_over_inference"] for kind in ("int8", "int4", "fp8")
        )
        figures["largest_layer_mb"] = round(largest_layer_mb(places), 2)
    return write_results("quzo", figures | {"measured": measured}, places.results)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=["memory", "spread", "report"])
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
    parser.add_argument("--document", type=Path, default=Path("docs/quzo.md"))
    options = parser.parse_args()
    places = Places(options.results, Path(), options.data, options.model or smollm2())
    if options.verb == "report":
        print(report(places, options.document))
    elif options.one in ("sgd", "adamw"):
        print(json.dumps(first_order(options.one, places)))
    elif options.one:
        print(json.dumps(memory.measure(options.one, places)))
    else:
        path = places.results / "quzo_measured.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        known = {key: known[key] for key in ("memory", "spread") if key in known}
        known[options.verb] = measure(places) if options.verb == "memory" else spread(places)
        print(write_results("quzo_measured", known, places.results))


if __name__ == "__main__":
    main()
