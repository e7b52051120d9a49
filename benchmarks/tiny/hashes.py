"""Print the rows of `qzo_diffusion/runs/former.py` for the shipped weights, one a quantization:

python -m benchmarks.tiny.hashes
"""

from typing import Any

from qzo_diffusion.config.files import make_config
from qzo_diffusion.runs import build
from qzo_diffusion.runs.style import pipeline

BLOCKS = (32, 64, 128, 256)
QUANTIZATIONS: list[dict[str, Any]] = [
    *(
        {"type": kind, "blocksize": block, "backend": backend}
        for kind in ("nf4", "fp4")
        for backend in ("bnb", "reference")
        for block in BLOCKS
    ),
    *({"type": kind, "backend": "intgrid"} for kind in ("int8", "int4", "fp8")),
]


def hashes_of(quantization: dict[str, Any]) -> tuple[str, str]:
    """Of the codes and of the scales."""
    settings = {"model": "tiny", "quant": quantization}
    config = make_config(settings | {"compute": {"device": "cpu", "dtype": "float32"}})
    model, scales, _ = pipeline.load_base(config, pipeline.find_runtime(config))
    return build.fingerprints(model, scales)


def main() -> None:
    for quantization in QUANTIZATIONS:
        codes, scales = hashes_of(quantization)
        print(f'"{codes}",  # {", ".join(map(str, quantization.values()))}')
        if quantization["backend"] == "intgrid":
            print(f'"{scales}",  # codes of {quantization["type"]}, intgrid')


if __name__ == "__main__":
    main()
