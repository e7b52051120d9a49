"""Train the embedded model from the drawings, then export and measure it:

    python -m benchmarks.tiny --data FOLDER --work FOLDER

FOLDER of --data holds emoji64.npz and meta.json (see README.md here); --work keeps the checkpoints.
Every stage resumes where it was stopped: autoencoder, denoiser with its text encoders, export to
--target, quality report. The first two do not need each other (`--stage vae` and
`--stage denoiser` can run side by side, one core each). With torchrun the denoiser trains on
several ranks; the other stages want one process."""

import argparse
from pathlib import Path

import torch

from benchmarks.tiny import ranks
from benchmarks.tiny.architecture import build_vae
from benchmarks.tiny.export import EXPORT_FOLDER, export
from benchmarks.tiny.quality import Sampling, write_report
from benchmarks.tiny.train_denoiser import build_model, train_denoiser
from benchmarks.tiny.train_vae import train_vae
from benchmarks.tiny.training import Recipe, load_average

STAGES = ("vae", "denoiser", "export", "quality")


def export_checkpoints(work: Path, target: Path, shift: float) -> None:
    vae, model = build_vae(), build_model()
    steps = {
        "vae": load_average(vae, work / "vae.safetensors"),
        "denoiser": load_average(model, work / "denoiser.safetensors"),
    }
    print(f"exported {export(vae, model, shift=shift, target=target)} bytes from steps {steps}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with emoji64.npz and meta.json")
    add("--work", type=Path, required=True, help="where checkpoints live between calls")
    add("--target", type=Path, default=EXPORT_FOLDER, help="where the pipeline is written")
    add("--begin-from", type=Path, help="a pipeline folder: begin with its weights")
    add("--stage", choices=STAGES, nargs="+", default=STAGES, help="only these stages")
    add("--vae-steps", type=int, default=2000)
    add("--vae-batch", type=int, default=16)
    add("--vae-rate", type=float, default=7e-4, help="the peak of the autoencoder's rate")
    add("--steps", type=int, default=19000, help="steps of the denoiser")
    add("--batch", type=int, default=32, help="batch of the denoiser on each rank")
    add("--rate", type=float, default=2e-3, help="the peak of the denoiser's rate")
    add("--compile", action="store_true", help="compile the transformer's blocks: a sixth faster")
    add("--shift", type=float, default=3.0, help="the scheduler's shift in the exported pipeline")


def train(args: argparse.Namespace) -> None:
    if "vae" in args.stage:
        recipe = Recipe(args.vae_steps, args.vae_rate, ema_decay=0.995)
        train_vae(args.data, args.work, recipe, batch=args.vae_batch, begin_from=args.begin_from)
    if "denoiser" in args.stage:
        joined = ranks.join()
        recipe = Recipe(args.steps, args.rate, ema_decay=0.999)
        train_denoiser(
            args.data,
            args.work,
            recipe,
            batch=args.batch,
            compiled=args.compile,
            begin_from=args.begin_from,
            ranks=joined,
        )
        ranks.leave(joined)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(
        1
    )  # of two threads that share a core with others each waits for the other
    train(args)
    if "export" in args.stage:
        export_checkpoints(args.work, args.target, args.shift)
    if "quality" in args.stage:
        write_report(args.data, Sampling(), folder=args.target)


if __name__ == "__main__":
    main()
