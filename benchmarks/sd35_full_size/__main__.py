"""Stable Diffusion 3.5 Large at full size on a CPU: `OMP_NUM_THREADS=2 python -m
benchmarks.sd35_full_size`.

The weights are gated, so these are synthetic ones in the real shapes: 8,056,627,520 parameters, 16
GB of bf16 in shards, streamed from disk through the path that a user's download takes. Stages, each
a process of its own with figures of its own, so that a run that was stopped goes on (`--stages`):

    shards     write the transformer in bf16 shards to --folder (16 GB)
    load       stream and quantize; peak of the resident set; store the 4-bit copy (4.8 GB)
    restart    load the copy, against reading the same bytes
    steps      two plain forwards, then ten steps of the default method and ten dense ones,
               at 256 px and batch 1
    export     nf4: packed codes equal to the base's, and a forward equal to the tuned model's
    reward     plain samplings of two pictures in four sampling steps, then a step on a reward
               that draws as many, at 256 px
    encoders   T5-XXL in NF4, CLIP-G, CLIP-L and the VAE at full size, in turn, at 512 px

Memory is VmHWM in units of 1e9 bytes, imports included; it is reset through /proc/self/clear_refs
before the steps. `--layers N` is the same in small. About 30 GB of disk are needed and checked for;
`--clean` removes them at the end."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.full_size.stages import run_apart
from benchmarks.record import write_results
from benchmarks.sd35_full_size.encoders import encoders
from benchmarks.sd35_full_size.exporting import export
from benchmarks.sd35_full_size.loading import load, restart, shards
from benchmarks.sd35_full_size.model import LARGE
from benchmarks.sd35_full_size.rewarding import reward
from benchmarks.sd35_full_size.stepping import steps

STAGES = ("shards", "load", "restart", "steps", "reward", "export", "encoders")
DEFAULT_FOLDER = Path.home() / ".cache" / "qzo_diffusion" / "sd35_full_size"
TOP = {
    "shards": ("parameters",),
    "load": ("load_peak_rss_gb",),
    "restart": ("second_start_over_read",),
    "steps": ("step_peak_rss_gb", "step_over_two_forwards", "memory_over_inference"),
    "reward": ("reward_step_over_sampling", "reward_step_peak_rss_gb"),
    "export": ("export_codes_equal", "export_forward_equal", "export_peak_rss_gb"),
    "encoders": ("encoders_peak_rss_gb",),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=DEFAULT_FOLDER, help="where shards, the copy and exports go"
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument(
        "--layers",
        type=int,
        default=LARGE["num_layers"],
        help="fewer for a smoke test; nothing is recorded then",
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--clean", action="store_true", help="remove --folder at the end")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_process:
        print(json.dumps(run_stage(args.stages[0], args)))
        return
    options = ["--steps", str(args.steps)]
    figures = run_apart("benchmarks.sd35_full_size", args.stages, args.folder, args.layers, options)
    if args.layers == LARGE["num_layers"]:
        top = {
            key: figures[stage][key]
            for stage, keys in TOP.items()
            if stage in figures
            for key in keys
        }
        print(write_results("sd35_full_size", top | {"stages": figures}))
    if args.clean:
        shutil.rmtree(args.folder)


def run_stage(stage: str, args: argparse.Namespace) -> dict[str, Any]:
    if stage == "steps":
        return steps(args.folder, args.steps)
    if stage in ("shards", "load", "encoders"):
        return {"shards": shards, "load": load, "encoders": encoders}[stage](
            args.folder, args.layers
        )
    return {"restart": restart, "reward": reward, "export": export}[stage](args.folder)


if __name__ == "__main__":
    main()
