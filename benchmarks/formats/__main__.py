"""Quantized files of pictures: what is read, tuned and written back.

    python -m benchmarks.formats make gguf DIR [--type Q4_K]
        a small random pipeline and its transformer in a GGUF file
    python -m benchmarks.formats small
        every type of block: round trip, a forward by diffusers, the share of a change that is kept
    OMP_NUM_THREADS=2 python -m benchmarks.formats full --folder DIR
        synthetic weights in the shape of SD3.5 Large in Q4_0 (4.8 GB): peak of loading, and memory
        and time of a step over plain forwards from the same file. `--layers N` is the same in
        small, and nothing is recorded then.

`small` and `full` write their part of results/formats.json and leave the others."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.formats.full import LAYERS, full
from benchmarks.formats.make import make_gguf
from benchmarks.formats.small import small
from benchmarks.record import RESULTS, write_results
from qzo_diffusion.quant.gguf import FACTORS

FULL = Path.home() / ".cache" / "qzo_diffusion" / "formats_full"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    make = verbs.add_parser("make")
    make.add_argument("format", choices=("gguf",))
    make.add_argument("folder", type=Path)
    make.add_argument("--type", choices=tuple(FACTORS), default="Q4_0")
    verbs.add_parser("small")
    whole = verbs.add_parser("full")
    whole.add_argument("--folder", type=Path, default=FULL)
    whole.add_argument("--layers", type=int, default=LAYERS)
    whole.add_argument("--steps", type=int, default=5)
    whole.add_argument("--clean", action="store_true", help="remove --folder at the end")
    whole.add_argument("--stage", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.verb == "make":
        print(make_gguf(args.folder, args.type))
    elif args.verb == "small":
        types = small()
        record({"formats": {"gguf": summary(types)}, "gguf_types": types})
    else:
        figures = full(args.folder, args.layers, args.steps, args.stage)
        print(json.dumps(figures))
        if args.stage is None and args.layers == LAYERS:
            record({"gguf_full_size": figures})
        if args.clean and args.stage is None:
            shutil.rmtree(args.folder)


def summary(types: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The worst of all types."""
    return {
        "roundtrip_identical": all(one["roundtrip_identical"] for one in types.values()),
        "forward_equal": all(one["forward_equal"] for one in types.values()),
        "foreign_reader": "diffusers",
        "change_kept": min(one["change_kept"] for one in types.values()),
    }


def record(part: dict[str, Any]) -> None:
    file = RESULTS / "formats.json"
    before = json.loads(file.read_text()) if file.is_file() else {}
    kept = {key: before[key] for key in ("gguf_types", "gguf_full_size") if key in before}
    formats = before.get("formats", {}) | part.pop("formats", {})
    print(write_results("formats", {"formats": formats} | kept | part))


if __name__ == "__main__":
    main()
