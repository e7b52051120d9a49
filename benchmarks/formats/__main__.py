"""Quantized files of pictures: what is read, tuned and written back.

    python -m benchmarks.formats make gguf DIR [--type Q4_K]
        a small random pipeline and its transformer in a GGUF file
    python -m benchmarks.formats small
        every type of block: round trip, a forward by diffusers, the share of a change that is kept
    python -m benchmarks.formats sdnq --style-dir DIR
        folders that the `sdnq` package quantizes: the same, on 20 steps of a run
    python -m benchmarks.formats bf16 --style-dir DIR
        formats without a file of their own: a run's export in bf16
    OMP_NUM_THREADS=2 python -m benchmarks.formats full --folder DIR
        synthetic weights in the shape of SD3.5 Large in Q4_0 (4.8 GB): peak of loading, and memory
        and time of a step over plain forwards from the same file. `--layers N` is the same in
        small, and nothing is recorded then.

All but `make` write their part of results/formats.json and leave the others."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.formats.full import LAYERS, full
from benchmarks.formats.make import make_gguf
from benchmarks.formats.of_package import KINDS as SDNQ
from benchmarks.formats.of_package import MISSING, is_here, of_package, reader
from benchmarks.formats.small import small
from benchmarks.formats.without_file import KINDS, READER, without_file
from benchmarks.record import RESULTS, update_results
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
    for verb in ("sdnq", "bf16"):
        trained = verbs.add_parser(verb)
        trained.add_argument("--style-dir", type=Path, required=True, help="captioned images")
        if verb == "sdnq":
            trained.add_argument("--kinds", nargs="+", choices=tuple(SDNQ), default=tuple(SDNQ))
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
        of_each = small()
        record("small", {"gguf": summary(of_each, "diffusers")}, gguf_types=of_each)
    elif args.verb == "sdnq":
        if not is_here():
            parser.error(MISSING)
        of_each = recorded().get("sdnq_kinds", {}) | of_package(args.style_dir, args.kinds)
        record("sdnq", {"sdnq": summary(of_each, reader())}, sdnq_kinds=of_each)
    elif args.verb == "bf16":
        of_each = without_file(args.style_dir)
        formats = {name: {of: of_each[of] for of in types} for name, types in KINDS.items()}
        record("bf16", {name: summary(one, READER) for name, one in formats.items()})
    else:
        figures = full(args.folder, args.layers, args.steps, args.stage)
        print(json.dumps(figures))
        if args.stage is None and args.layers == LAYERS:
            record("full", {}, gguf_full_size=figures)
        if args.clean and args.stage is None:
            shutil.rmtree(args.folder)


def summary(kinds: dict[str, dict[str, Any]], reader: str) -> dict[str, Any]:
    """The worst of all kinds; None for the round trip where there is no file."""
    there = [one["roundtrip_identical"] for one in kinds.values()]
    return {
        "roundtrip_identical": None if None in there else all(there),
        "forward_equal": all(one["forward_equal"] for one in kinds.values()),
        "foreign_reader": reader,
        "change_kept": min(one["change_kept"] for one in kinds.values()),
    }


def record(verb: str, formats: dict[str, Any], **figures: Any) -> None:
    figures["formats"] = recorded()["formats"] | formats
    print(update_results("formats", verb, figures, {}))


def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / "formats.json").read_text())
    return found


if __name__ == "__main__":
    main()
