"""Train the embedded scorer, then export and measure it:

    OMP_NUM_THREADS=1 python -m benchmarks.scorer --data FOLDER --work FOLDER

FOLDER of --data holds emoji64.npz and meta.json (see benchmarks/tiny/README.md); --work keeps the
checkpoint, from which a stopped training goes on. The weights go to qzo_diffusion/models/scorer,
the figures to benchmarks/results/scorer_quality.json."""

import argparse
from pathlib import Path

from benchmarks.scorer.quality import write_report
from benchmarks.scorer.train import EXPORT_FOLDER, export, train

STAGES = ("train", "quality")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with emoji64.npz and meta.json"
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="where the checkpoint lives between calls"
    )
    parser.add_argument(
        "--stage", choices=STAGES, nargs="+", default=STAGES, help="only these stages"
    )
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument(
        "--folder", type=Path, default=EXPORT_FOLDER, help="where the scorer is written"
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if "train" in args.stage:
        model = train(args.data, args.work, steps=args.steps, batch=args.batch)
        print(f"exported {export(model, args.folder)} bytes to {args.folder}")
    if "quality" in args.stage:
        write_report(args.data, args.folder)


if __name__ == "__main__":
    main()
