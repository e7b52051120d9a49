"""Train the embedded model from the drawings, then export and measure it:

    python -m benchmarks.tiny --data FOLDER --work FOLDER

FOLDER of --data holds emoji64.npz and meta.json (see README.md here); --work keeps the checkpoints.
Every stage resumes where it was stopped: autoencoder, denoiser with its text encoders, export to
qzo_diffusion/models/tiny, quality report. The first two do not need each other (`--stage vae` and
`--stage denoiser` can run side by side, one core each)."""

import argparse
from pathlib import Path

from benchmarks.tiny.architecture import build_vae
from benchmarks.tiny.export import export
from benchmarks.tiny.quality import Sampling, write_report
from benchmarks.tiny.train_denoiser import build_model, train_denoiser
from benchmarks.tiny.train_vae import train_vae
from benchmarks.tiny.training import load_average

STAGES = ("vae", "denoiser", "export", "quality")


def export_checkpoints(data: Path, work: Path, shift: float) -> None:
    vae, model = build_vae(), build_model(data)
    steps = {
        "vae": load_average(vae, work / "vae.safetensors"),
        "denoiser": load_average(model, work / "denoiser.safetensors"),
    }
    print(f"exported {export(vae, model, shift=shift)} bytes from steps {steps}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with emoji64.npz and meta.json"
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="where checkpoints live between calls"
    )
    parser.add_argument(
        "--stage", choices=STAGES, nargs="+", default=STAGES, help="only these stages"
    )
    parser.add_argument("--vae-steps", type=int, default=1500)
    parser.add_argument("--vae-batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4800, help="steps of the denoiser")
    parser.add_argument("--batch", type=int, default=32, help="batch of the denoiser")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the transformer's blocks: minutes first, a fifth faster then",
    )
    parser.add_argument(
        "--shift", type=float, default=3.0, help="the scheduler's shift in the exported pipeline"
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if "vae" in args.stage:
        train_vae(args.data, args.work, steps=args.vae_steps, batch=args.vae_batch)
    if "denoiser" in args.stage:
        train_denoiser(
            args.data, args.work, steps=args.steps, batch=args.batch, compiled=args.compile
        )
    if "export" in args.stage:
        export_checkpoints(args.data, args.work, args.shift)
    if "quality" in args.stage:
        write_report(args.data, Sampling())


if __name__ == "__main__":
    main()
