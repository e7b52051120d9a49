"""How much of a run's change a LoRA keeps at each rank:
`python -m benchmarks.everyday.lora_rank --run RUN`.

RUN is a finished run of pictures, such as the one of `make demo`. Each rank is exported as
`qzo-diffuse export --format lora` does, into a temporary folder; the last one is full."""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.everyday.figures import record

RANKS = (1, 4, 16, 32, 64, 128, 4096)


def kept_by_rank(run: Path, ranks: tuple[int, ...] = RANKS) -> dict[str, dict[str, float]]:
    """Rank of the file -> `norm_kept` and `forward_error`, as the export says them."""
    from qzo_diffusion.runs.style import export

    found: dict[str, dict[str, float]] = {}
    for rank in ranks:
        with tempfile.TemporaryDirectory() as place:
            told: dict[str, Any] = export.run(run, "lora", Path(place) / "lora", rank=rank)
        names = ("norm_kept", "forward_error")
        found[str(told["rank"])] = {name: round(told[name], 5) for name in names}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True)
    found = kept_by_rank(parser.parse_args().run)
    print(json.dumps(found, indent=1))
    print(record("lora_rank", {"lora_rank": found}))


if __name__ == "__main__":
    main()
