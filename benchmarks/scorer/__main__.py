"""Train the embedded scorer, then export and measure it:

    OMP_NUM_THREADS=1 python -m benchmarks.scorer --data FOLDER --work FOLDER

FOLDER of --data holds emoji64.npz and meta.json (see benchmarks/tiny/README.md); --work keeps the
checkpoint, from which a stopped training goes on. The weights go to qzo_diffusion/models/scorer,
the figures to benchmarks/results/scorer_quality.json."""

import argparse
from pathlib import Path

from benchmarks.scorer.quality import write_report
from benchmarks.scorer.train import EXPORT_FOLDER, export, train
from benchmarks.tiny.training import Recipe

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
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument(
        "--folder", type=Path, default=EXPORT_FOLDER, help="where the scorer is written"
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if "train" in args.stage:
        recipe = Recipe(args.steps, 1.5e-3, weight_decay=0.05, ema_decay=0.995)
        model, tokenizer = train(args.data, args.work, recipe, batch=args.batch)
        size = export(model, tokenizer, args.data, args.folder)
        print(f"exported {size} bytes to {args.folder}")
    if "quality" in args.stage:
        write_report(args.data, args.folder)


if __name__ == "__main__":
    main()
