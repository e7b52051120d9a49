"""QZO beside MeZO, QLoRA and first order on real language-model tasks: `python -m benchmarks.llm_compare run --data FOLDER`.

Every cell is a run of `qzo-diffuse llm` on SmolLM2-135M-Instruct: a task, a method, a seed. Cells that are finished are skipped,
one that was stopped goes on, and none takes more than 40 minutes of the processor. `memory` measures the peaks of a step and of
inference, `report` writes the JSON, the table and the plot from whatever is finished. FOLDER holds sst2/, rte/, superglue_CB/,
superglue_BoolQ/ and xquad.en.json.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, provenance, write_results
from benchmarks.smollm2 import smollm2
from qzo_diffusion.train.interrupt import stop_on_signal

BATCH, LIMIT_SECONDS = 16, 40 * 60
TABLE = ("<!-- table: python -m benchmarks.llm_compare report -->", "<!-- end of table -->")

# Settings of each task beside its own; `dir` is inside the folder of data.
TASKS: dict[str, dict[str, Any]] = {
    "sst2": {"dir": "sst2", "steps": 2000, "settings": ["data.validation_examples=200", "data.max_tokens=64"]},
    "rte": {"dir": "rte", "steps": 200, "settings": ["data.max_tokens=256"]},
    "boolq": {
        "dir": "superglue_BoolQ",
        "steps": 200,
        "settings": ["data.train_file=val.jsonl", "data.test_file=val.jsonl", "data.max_tokens=256"],
    },
    "cb": {
        "dir": "superglue_CB",
        "steps": 20,
        "settings": ["data.train_examples=24", "data.validation_examples=8", "data.max_tokens=256"],
    },
    "squad": {
        "dir": ".",
        "steps": 20,
        "settings": [
            "data.train_file=xquad.en.json",
            "data.test_file=xquad.en.json",
            "data.test_examples=100",
            "data.max_tokens=384",
        ],
    },
}
PAPER = ["qzo.parametrization=dense", "qzo.units=absolute", "qzo.eps=1e-3", "qzo.directions=gaussian", "train.schedule=constant"]
PAPER += ["train.lr=1e-7", "compute.dtype=float32"]  # in bfloat16 rounding swallows an eps of 0.2 % of a scale
BFLOAT16 = ["compute.dtype=bfloat16"]


@dataclass(frozen=True)
class Method:
    """A `--method` with settings; `trained` False only evaluates. seeds, on SST-2 alone; tasks None is all of them."""

    method: str
    settings: tuple[str, ...] = ()
    trained: bool = True
    seeds: int = 1
    share_of_steps: float = 1.0
    tasks: tuple[str, ...] | None = None

    @property
    def first_order(self) -> bool:
        return self.method in ("qlora", "fo-scales")


def _clipped(threshold: str) -> Method:
    return Method("qzo", (*PAPER, f"qzo.clip_threshold={threshold}"), tasks=("sst2",))


def _quzo(*settings: str, share: float = 0.1) -> Method:
    """Fewer steps than the others: noise for every weight, drawn again for twenty past steps, makes one three times as long."""
    return Method("quzo", (*BFLOAT16, *settings), tasks=("sst2",), share_of_steps=share)


# Before the default was found: less of what rounding left, and a higher rate that stays.
SHORT_FEEDBACK = ("train.feedback_decay=0.9", "train.feedback_steps=20", "train.schedule=constant")


METHODS: dict[str, Method] = {
    "zero_shot": Method("mezo", (), trained=False),  # unquantized, which for this model is dequantized Q4_1
    "zero_shot_quantized": Method("qzo", (), trained=False),
    "default": Method("qzo", tuple(BFLOAT16), seeds=3),
    "middle_columns": Method(  # the default before
        "qzo",
        (
            f"qzo.layers=[{','.join(f'layers.{block}' for block in range(12, 21))}]",
            "qzo.parametrization=column",
            "qzo.eps=0.03",
            "train.lr=0.025",
            *BFLOAT16,
        ),
        seeds=3,
        tasks=("sst2",),
    ),
    "all_layers": Method(  # and before that
        "qzo",
        ("qzo.layers=null", "qzo.parametrization=separable", "qzo.eps=0.01", "train.lr=0.005", *BFLOAT16),
        tasks=("sst2",),
    ),
    "paper": Method("qzo", (*PAPER, "qzo.clip_threshold=100"), seeds=3),
    # Signs in place of Gaussian numbers: a step draws 106 million of them three times, and the limit is one of time.
    "mezo": Method("mezo", ("qzo.directions=rademacher", *BFLOAT16)),
    "fo_scales": Method("fo-scales", tuple(BFLOAT16), share_of_steps=0.25),
    "qlora": Method("qlora", tuple(BFLOAT16), share_of_steps=0.25),
    "quzo_int8": _quzo(*SHORT_FEEDBACK, "train.lr=0.3"),
    "quzo_int8_slow": _quzo("train.feedback_decay=0.95", "train.feedback_steps=40", "train.lr=0.2", "train.schedule=linear"),
    "quzo_int8_long": _quzo(share=0.28),  # the default for as many steps as 40 minutes hold
    "quzo_int8_cosine": _quzo(*SHORT_FEEDBACK[:2], "train.lr=0.3", "train.schedule=cosine", share=0.2),
    "quzo_int8_plain": _quzo(
        "train.optimizer=sgd", "train.lr=0.8", "train.schedule=constant"
    ),  # of the slope itself: about 0.05 codes a step
    "quzo_w8a8": _quzo("quant.activations=int8"),
    "quzo_int4": _quzo("quant.type=int4", *SHORT_FEEDBACK, "train.lr=0.08"),
    "quzo_int4_plain": _quzo(
        "quant.type=int4", "train.optimizer=sgd", "train.lr=0.02", "train.schedule=constant", share=0.05
    ),  # about 0.01 codes a step
    "quzo_fp8": _quzo("quant.type=fp8", *SHORT_FEEDBACK, "train.lr=0.2", share=0.015),
    "quzo_lora": Method("quzo-lora", tuple(BFLOAT16), tasks=("sst2",), share_of_steps=0.1),
    "qzo_int8": Method(
        "qzo", ("quant.backend=intgrid", "quant.type=int8", *BFLOAT16), tasks=("sst2",), share_of_steps=0.2
    ),  # the same codes, fixed
    "paper_clip_50": _clipped("50"),
    "paper_clip_150": _clipped("150"),
    "paper_clip_off": _clipped("null"),
}


@dataclass(frozen=True)
class Cell:
    task: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}/{self.method}_{self.seed}"


@dataclass(frozen=True)
class Places:
    """results: finished cells; cache: run folders, outside of the repository; data, model: folders."""

    results: Path
    cache: Path
    data: Path
    model: Path
    steps: int | None = None  # of every run, for a quick look

    def result(self, cell: Cell) -> Path:
        return self.results / "cells" / "llm" / f"{cell.name}.json"


def cells(pattern: str) -> list[Cell]:
    found = []
    for task in TASKS:
        for name, method in METHODS.items():
            if method.tasks is None or task in method.tasks:
                found += [Cell(task, name, seed) for seed in range(method.seeds if task == "sst2" else 1)]
    return [cell for cell in found if any(fnmatch(cell.name, one) for one in pattern.split(","))]


def arguments_of(cell: Cell, places: Places) -> list[str]:
    """Everything behind `llm train` or `llm evaluate` that makes the cell what it is."""
    task, method = TASKS[cell.task], METHODS[cell.method]
    arguments = ["--task", cell.task, "--model", str(places.model), "--data-dir", str(places.data / task["dir"])]
    arguments += ["--method", method.method, f"data.batch_size={BATCH}", *task["settings"], *method.settings]
    if method.trained:
        steps = places.steps or round(task["steps"] * method.share_of_steps)
        arguments += ["--max-steps", str(steps), "--seed", str(cell.seed), "train.validate_every=100"]
    return [*arguments, "--json"]


def run_cell(cell: Cell, places: Places, stop: threading.Event) -> dict[str, Any] | None:
    """The result, which is also written; None when it was stopped, and then the same call goes on."""
    method, folder = METHODS[cell.method], places.cache / cell.name
    ended, spent = "budget", _spent(folder)
    if method.trained:
        going = (folder / "metrics.jsonl").exists()
        if not going:  # stopped while it was loading: nothing is lost
            shutil.rmtree(folder, ignore_errors=True)
        where = ["--resume" if going else "--output-dir", str(folder)]
        command = ["train", *arguments_of(cell, places), *where]
        code, output, seconds = _call(command, stop, LIMIT_SECONDS - spent)
        spent += seconds
        _note_spent(folder, spent)
        if code in (130, -signal.SIGTERM) and stop.is_set():
            return None
        if code not in (0, 130) and not _diverged(folder):
            raise RuntimeError(f"{cell.name}: exit code {code}")
        ended = {0: "budget", 130: "time limit"}.get(code, "diverged")
        found = json.loads(output) if output.strip() else {}
    if not method.trained or ended == "time limit":
        newest = max((folder / "checkpoints").glob("step_*"), default=None) if method.trained else None
        where = ["--run", str(newest)] if newest else arguments_of(cell, places)[:-1]
        code, output, seconds = _call(["evaluate", *where, "--json"], stop, LIMIT_SECONDS)
        if code != 0:
            return None
        evaluated = json.loads(output)
        found = (found if method.trained else {}) | evaluated | {evaluated["metric"]: {"end": evaluated[evaluated["metric"]]}}
    figure = found.get(found.get("metric", ""), {})
    steps = found.get("steps", 0)
    result = {
        "task": cell.task,
        "method": cell.method,
        "seed": cell.seed,
        "ended": ended,
        "metric": found.get("metric"),
        "value": figure.get("end"),
        "value_at_start": figure.get("start"),
        "test_examples": found.get("test_examples"),
        "validation_loss": found.get("validation_loss"),
        "steps": steps,
        "forwards": steps * BATCH * (1 if method.first_order else 2),
        "processor_seconds": round(spent, 1),
        "curve": _curve(folder, BATCH * (1 if method.first_order else 2)) if method.trained else [],
        "settings": [one for one in arguments_of(cell, places) if "=" in one],
        "provenance": provenance() | {"command": f"python -m benchmarks.llm_compare run --data FOLDER --cells '{cell.name}'"},
    }
    places.result(cell).parent.mkdir(parents=True, exist_ok=True)
    places.result(cell).write_text(json.dumps(result, indent=1) + "\n")
    return result


def _curve(folder: Path, forwards_of_step: int) -> list[tuple[int, float]]:
    """(example-forwards, held-out loss); of first order, examples that went forwards and backwards."""
    metrics = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    return [(line["step"] * forwards_of_step, round(line["validation_loss"], 4)) for line in lines if "validation_loss" in line]


def _diverged(folder: Path) -> bool:
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return bool(lines) and json.loads(lines[-1]).get("skipped", False)


def _call(arguments: list[str], stop: threading.Event, limit: float) -> tuple[int, str, float]:
    """Exit code, stdout and processor seconds of `qzo-diffuse llm ...`; ended after its step when asked to, or at the limit."""
    process = subprocess.Popen([sys.executable, "-m", "qzo_diffusion.cli", "llm", *arguments], stdout=subprocess.PIPE, text=True)
    while True:
        try:
            output, _ = process.communicate(timeout=1)
            break
        except subprocess.TimeoutExpired:
            if stop.is_set() or _processor_seconds(process.pid) > limit:
                process.send_signal(signal.SIGTERM)
                output, _ = process.communicate()
                break
    return process.returncode, output, _children_seconds()


_before = 0.0


def _children_seconds() -> float:
    """Of the processor, of children that ended since the last call."""
    global _before
    times = os.times()
    total, before = times.children_user + times.children_system, _before
    _before = total
    return total - before


def _processor_seconds(process: int) -> float:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _spent(folder: Path) -> float:
    path = folder.with_suffix(".seconds")
    return float(path.read_text()) if path.exists() else 0.0


def _note_spent(folder: Path, seconds: float) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.with_suffix(".seconds").write_text(str(seconds))


def memory(name: str, places: Places) -> dict[str, float]:
    """Peaks of a step and of inference on the same batch of SST-2, above what the process held after its imports, in MB."""
    import bitsandbytes  # noqa: F401  before the first look at the memory, as all that is imported on use elsewhere
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401

    from benchmarks.resident import peak_of, resident
    from qzo_diffusion import build, llm_run
    from qzo_diffusion.config import make_config, parse_override, set_dotted
    from qzo_diffusion.core.spsa import mean_loss
    from qzo_diffusion.llm.objectives import task_loss
    from qzo_diffusion.llm.tasks import Batch, encode
    from qzo_diffusion.llm_config import LlmConfig
    from qzo_diffusion.llm_data import TextBatches
    from qzo_diffusion.llm_methods import load_base
    from qzo_diffusion.train.loop import train

    imports = resident("VmRSS")
    method = METHODS["zero_shot" if name == "adamw" else name]
    settings: dict[str, Any] = {"task": "sst2", "model": str(places.model), "method": method.method}
    for text in [*TASKS["sst2"]["settings"], *method.settings, f"data.dir={places.data / 'sst2'}"]:
        set_dotted(settings, *parse_override(text, LlmConfig))
    plan = llm_run.make_plan(make_config(settings, LlmConfig))
    base = load_base(plan.config, plan.model_folder, plan.device, plan.dtype)
    # As many sentences in flight as in an inference forward: +eps and -eps of half the batch at a time.
    size = BATCH // 2 if plan.config.qzo.has_gains else BATCH
    encoded = encode(base.lm, plan.splits.train, plan.config.data.max_tokens)
    whole = TextBatches(base.lm, encoded, batch_size=BATCH, seed=0)
    folder = Path(tempfile.mkdtemp())
    batches = TextBatches(base.lm, encoded, batch_size=BATCH, seed=0, micro_batch_size=size, keep_in=folder)

    def objective(batch: Batch) -> torch.Tensor:
        return task_loss(base.lm, batch)

    def inference() -> None:
        for step in range(2):
            mean_loss(objective, whole(step).micro_batches)

    def steps() -> None:
        probing, schedule = build.probing(plan.config), build.schedule(plan.config)
        numbers, optimizer = base.numbers, base.optimizer
        train(objective, batches, numbers, optimizer, probing, schedule, max_steps=2, take_step=base.take_step)

    def full_tuning() -> None:
        weights = [base.lm.model.get_submodule(layer).weight.requires_grad_(True) for layer in base.scales]
        optimizer = torch.optim.AdamW(weights)
        for step in range(2):
            optimizer.zero_grad()
            (objective(whole(step).micro_batches[0]).sum() / BATCH).backward()
            optimizer.step()

    inference()
    at_rest = peak_of(inference) - imports
    take = full_tuning if name == "adamw" else steps
    take()  # 16-bit products keep 3 MB for every shape that they have seen, and a step's are others: none may be new below
    again = peak_of(inference)
    step = at_rest + peak_of(take) - again
    return {"inference_mb": round(at_rest / 1e6), "step_mb": round(step / 1e6), "memory_over_inference": round(step / at_rest, 4)}


def plot(results: list[dict[str, Any]], picture: Path) -> None:
    """Held-out loss of SST-2 against forwards, a line for every run."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    panel = figure.subplots()
    drawn = [name for name in METHODS if any(result["method"] == name and result.get("curve") for result in results)]
    colours = {name: matplotlib.colormaps["tab20"](index % 20) for index, name in enumerate(drawn)}
    for result in results:
        if result["task"] == "sst2" and result.get("curve"):
            spent, losses = zip(*result["curve"], strict=True)
            line = "--" if METHODS[result["method"]].first_order else "-"
            label = result["method"] if result["seed"] == 0 else None
            panel.plot(spent, losses, line, color=colours[result["method"]], label=label, linewidth=1.3)
    panel.set_xlabel("example-forwards (dashed: examples forwards and backwards)")
    panel.set_ylabel("held-out loss, SST-2")
    if panel.lines:
        panel.legend(fontsize=8)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


def report(places: Places, document: Path) -> Path:
    picture = document.parent / "images" / "llm.png"
    found = [json.loads(path.read_text()) for path in sorted((places.results / "cells" / "llm").glob("*/*.json"))]
    peaks = places.results / "llm_memory.json"
    memories: dict[str, Any] = json.loads(peaks.read_text())["methods"] if peaks.exists() else {}
    tasks: dict[str, dict[str, Any]] = {}
    for result in found:
        tasks.setdefault(result["task"], {}).setdefault(result["method"], []).append(result)
    figures = {task: {name: _figures(runs, memories.get(name)) for name, runs in of.items()} for task, of in tasks.items()}
    lines = ["| task | method | metric | mean | runs | forwards | processor s | held-out loss | memory over inference |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for task, of in figures.items():
        for name in sorted(of, key=list(METHODS).index):
            one = of[name]
            value = "diverged" if one["accuracy"] is None else f"{one['accuracy']:.3f} ± {one['accuracy_std']:.3f}"
            loss, peak = _way_down(one), one["memory_over_inference"]
            row = [task, name, one["metric"], value, one["runs"], one["forwards"], one["seconds"], loss, peak or "-"]
            lines.append("| " + " | ".join(map(str, row)) + " |")
    text = document.read_text(encoding="utf-8")
    head, _, rest = text.partition(TABLE[0])
    document.write_text(head + "\n".join([TABLE[0], "", *lines, "", TABLE[1]]) + rest.partition(TABLE[1])[2], encoding="utf-8")
    plot(found, picture)
    shares = {task: share for task, of in figures.items() if (share := _gain_share(of)) is not None}
    return write_results("llm_compare", {"tasks": figures, "gain_share": shares, "memory": memories}, places.results)


def _figures(runs: list[dict[str, Any]], memory_of: dict[str, float] | None) -> dict[str, Any]:
    values = [run["value"] for run in runs if run["value"] is not None]
    losses = [run["validation_loss"]["end"] for run in runs if run["validation_loss"]]
    starts = [run["validation_loss"]["start"] for run in runs if run["validation_loss"]]
    curves = [
        [run["validation_loss"]["end"], *(loss for _, loss in run.get("curve", []))] for run in runs if run["validation_loss"]
    ]
    lowest = [min(curve) for curve in curves]
    return {
        "metric": runs[0]["metric"],
        "accuracy": round(statistics.fmean(values), 4) if values else None,
        "accuracy_std": round(statistics.stdev(values), 4) if len(values) > 1 else 0.0,
        "runs": len(runs),
        "ended": sorted({run["ended"] for run in runs}),
        "forwards": max(run["forwards"] for run in runs),
        "seconds": round(statistics.fmean(run["processor_seconds"] for run in runs)),
        "validation_loss": round(statistics.fmean(losses), 4) if losses else None,
        "lowest_validation_loss": round(statistics.fmean(lowest), 4) if lowest else None,
        "validation_loss_at_start": round(statistics.fmean(starts), 4) if starts else None,
        "memory_over_inference": memory_of["memory_over_inference"] if memory_of else None,
    }


def _way_down(one: dict[str, Any]) -> str:
    """Start, end, and the lowest where that is clearly lower."""
    start, end, lowest = one["validation_loss_at_start"], one["validation_loss"], one["lowest_validation_loss"]
    if end is None:
        return "-"
    return f"{start:.3f} -> {end:.3f}" + (f" (lowest {lowest:.3f})" if lowest < 0.9 * end else "")


def _gain_share(of: dict[str, Any]) -> float | None:
    """Of first order's way down from the same start, to its lowest loss before it overfits, how much the default goes."""
    ours, exact = of.get("default"), of.get("fo_scales")
    if not ours or not exact or ours["validation_loss"] is None or exact["lowest_validation_loss"] is None:
        return None
    start = ours["validation_loss_at_start"]
    return round((start - ours["validation_loss"]) / (start - exact["lowest_validation_loss"]), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["run", "memory", "report"])
    parser.add_argument("--data", type=Path, default=Path("."), help="the folder of the tasks' data")
    parser.add_argument("--cells", default="*", metavar="PATTERN", help="TASK/METHOD_SEED with wildcards, several parted by commas")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/qzo_diffusion/llm_compare", help="for run folders")
    parser.add_argument("--model", type=Path, help="a transformers folder; default SmolLM2, converted where it isn't there yet")
    parser.add_argument("--steps", type=int, help="of every run, for a quick look")
    parser.add_argument("--method", choices=[*METHODS, "adamw"], help="memory of one method, printed (used by the whole)")
    parser.add_argument("--document", type=Path, default=Path("docs/llm.md"))
    options = parser.parse_args()
    places = Places(options.results, options.cache, options.data, options.model or smollm2(), options.steps)
    if options.verb == "report":
        print(report(places, options.document))
    elif options.method:
        print(json.dumps(memory(options.method, places)))
    elif options.verb == "memory":
        found = {}
        for name in ("default", "paper", "mezo", "fo_scales", "qlora", "adamw"):  # a process each: peaks must not hide one another
            command = [sys.executable, "-m", "benchmarks.llm_compare", "memory", "--method", name, "--data", str(places.data)]
            command += ["--model", str(places.model)]
            # Freed buffers go back at once, else the peak is that of the holes between them, which differ from run to run.
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"}
            output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
            found[name] = json.loads(output.splitlines()[-1])
            print(name, found[name], file=sys.stderr)
        print(write_results("llm_memory", {"methods": found}, places.results))
    else:
        with stop_on_signal(lambda text: print(text, file=sys.stderr)) as stop:
            for cell in cells(options.cells):
                if not places.result(cell).exists() and run_cell(cell, places, stop) is None:
                    sys.exit(75)


if __name__ == "__main__":
    main()
