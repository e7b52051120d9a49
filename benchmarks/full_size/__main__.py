"""A family's model at full size on a CPU: `python -m benchmarks.full_size zimage`.

Weights are synthetic, in the real shapes, and streamed from disk through the path that a user's
download takes. Stages, each a process of its own with figures of its own (`--stages`):

    shards     write the denoiser in bf16 shards to --folder (12 GB for Z-Image, 8 for klein)
    load       stream and quantize; peak of the resident set; store the 4-bit copy
    steps      two plain forwards, then ten steps of the default method, at 256 px and batch 1
    encoder    write the language model in bf16 (8 GB), read it into NF4, and encode a prompt

Memory is VmHWM in units of 1e9 bytes, imports included. `--layers N` is the same in small, and
nothing is recorded then. `--clean` removes the folder at the end. Figures go to `full_size` of
results/families.json."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from benchmarks.families.results import record
from benchmarks.full_size.encoder import encoder
from benchmarks.full_size.loading import load, shards
from benchmarks.full_size.model import Subject, import_everything, load_model
from benchmarks.full_size.stages import run_apart
from benchmarks.full_size.stepping import DEFAULT, steps_of
from benchmarks.record import provenance
from qzo_diffusion.diffusion.families import registry

MODELS = {
    "zimage": "Tongyi-MAI/Z-Image",
    "flux2_klein_4b": "black-forest-labs/FLUX.2-klein-base-4B",
}
STAGES = ("shards", "load", "steps", "encoder")
FOLDER = Path.home() / ".cache" / "qzo_diffusion" / "full_size"
ALL, SIDE = 10**3, 256


def subject_of(name: str, layers: int) -> Subject:
    found = registry.published(MODELS[name])
    assert found is not None
    return Subject(*found, layers)


def steps(subject: Subject, folder: Path, count: int, dtype: torch.dtype) -> dict[str, Any]:
    import_everything(subject.config)
    figures = steps_of(
        subject.family,
        lambda: load_model(subject.family, folder, folder / "copies", dtype),
        lambda model: subject.batch(SIDE),
        count,
        DEFAULT,
        dtype,
    )
    # the peak is that of loading as well
    ratio = figures["step_peak_rss_gb"] / figures["inference_peak_rss_gb"]
    own = {"memory_over_inference": round(ratio, 4), "dtype": str(dtype).removeprefix("torch.")}
    return figures | own


def run_stage(
    stage: str,
    subject: Subject,
    folder: Path,
    count: int,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    if stage == "steps":
        return steps(subject, folder, count, dtype)
    if stage == "load":
        return load(subject, folder, dtype)
    return {"shards": shards, "encoder": encoder}[stage](subject, folder)


def summary(figures: dict[str, Any]) -> dict[str, Any]:
    """Return the figures that are compared with bars, of the stages that ran."""
    found = {key: value for stage in STAGES for key, value in figures.get(stage, {}).items()}
    found["step_over_forwards"] = found.get("step_over_two_forwards")
    keys = ("parameters", "load_peak_rss_gb", "step_peak_rss_gb", "memory_over_inference")
    keys += ("step_over_forwards", "encoder_peak_rss_gb", "encoder_peak_allowed_gb")
    return {key: found[key] for key in keys if found.get(key) is not None}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("--folder", type=Path, help="where shards and the copy go")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--layers", type=int, default=ALL, help="fewer for a smoke test")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of stages load and steps; some processors are 40 times slower in bfloat16",
    )
    parser.add_argument("--clean", action="store_true", help="remove --folder at the end")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    subject, folder = subject_of(args.name, args.layers), args.folder or FOLDER / args.name
    if args.in_process:
        dtype = getattr(torch, args.dtype)
        print(json.dumps(run_stage(args.stages[0], subject, folder, args.steps, dtype)))
        return
    # the name comes first: --stages takes all words behind it
    options = ["--steps", str(args.steps), "--dtype", args.dtype, "--", args.name]
    figures = run_apart("benchmarks.full_size", args.stages, folder, args.layers, options)
    if args.layers == ALL:
        details = {"measured": provenance(), "stages": figures}
        print(record("full_size", args.name, summary(figures) | details))
    if args.clean:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
