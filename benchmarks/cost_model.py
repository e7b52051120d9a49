"""What a step of Stable Diffusion 3.5 Large should cost on a GPU, computed and not measured:
`python -m benchmarks.cost_model`.

Work is counted from the model's own shapes (built on the meta device), time is the larger of
arithmetic over the card's peak and bytes over its bandwidth, for each kind of work by itself. Real
kernels reach 50 to 70 % of either, all terms alike, so the ratios between terms say more than the
seconds. Writes the table of docs/cost.md."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.record import put_between_markers, write_results
from benchmarks.sd35_full_size.model import LARGE
from qzo_diffusion.diffusion.families.sd3 import SD3
from qzo_diffusion.diffusion.transformer import empty_transformer
from qzo_diffusion.quant.base import linears_to_quantize

DOCUMENT = Path(__file__).parents[1] / "docs/cost.md"
BEGIN, END = "<!-- table: written by `python -m benchmarks.cost_model` -->", "<!-- end of table -->"
BLOCK, REGIONS, TEXT_TOKENS = 64, 16, 333
# 64 bits each, numpy on one core of the machine that the other benchmarks name
PHILOX_WORDS_PER_SECOND = 130e6


@dataclass(frozen=True)
class Card:
    """flops: dense bf16 with fp32 sums, of the data sheet. bandwidth: bytes a second."""

    name: str
    flops: float
    bandwidth: float


CARDS = [
    Card("RTX 3060, 12 GB", 51e12, 360e9),
    Card("RTX 4070, 12 GB", 58e12, 504e9),
    Card("RTX 4090, 24 GB", 165e12, 1008e9),
]


@dataclass(frozen=True)
class Linears:
    """Of the quantized layers: weights, scales, rows and columns of blocks in all, and rows of
    pointwise ones.
    """

    weights: int
    scales: int
    rows: int
    columns: int
    pointwise_rows: int
    pointwise_columns: int


def count(model: nn.Module) -> tuple[Linears, dict[str, tuple[int, int]]]:
    shapes = {
        name: (layer.out_features, layer.in_features)
        for name, layer in linears_to_quantize(model, SD3.denoiser.skip, BLOCK)
    }
    apart = set(SD3.denoiser.own_patch(shapes))
    weights = sum(n * k for n, k in shapes.values())
    return Linears(
        weights,
        weights // BLOCK,
        sum(n for n, _ in shapes.values()),
        sum(k // BLOCK for _, k in shapes.values()),
        sum(n for name, (n, _) in shapes.items() if name in apart),
        sum(k // BLOCK for name, (_, k) in shapes.items() if name in apart),
    ), shapes


def tokens_of(name: str, image: int) -> int:
    """How many rows a layer's input has for one example."""
    if "norm1" in name:
        return 1
    return (
        TEXT_TOKENS if any(part in name for part in (".add_", "_context", "to_add_out")) else image
    )


def costs(side: int, batch: int, card: Card) -> dict[str, float]:
    """Milliseconds of each kind of work where as many examples are probed in one forward as two of
    `batch` examples hold.

    side: in pixels.
    """
    linears, shapes = count(empty_transformer(LARGE))
    image = (side // 16) ** 2
    examples = 2 * batch
    products = sum(2 * n * k * tokens_of(name, image) for name, (n, k) in shapes.items()) * examples
    attention = 38 * 4 * (image + TEXT_TOKENS) ** 2 * 2432 * examples
    # read codes and scales, write bf16, read it in the product
    unpack = linears.weights * (0.5 + 2 + 2) + linears.scales * 4
    outputs = sum((n + k) * tokens_of(name, image) for name, (n, k) in shapes.items()) * examples
    factors = (
        (linears.rows + linears.columns)
        + (linears.pointwise_rows + linears.pointwise_columns) * REGIONS
    ) * examples
    dense_bits = linears.scales

    def longer(flops: float, moved: float) -> float:
        return 1e3 * max(flops / card.flops, moved / card.bandwidth)

    two = longer(products + attention, 0) + 2 * longer(0, unpack)
    probes = (
        longer(products + attention, 0)
        + longer(0, unpack)
        + longer(0, 4 * outputs)
        + longer(0, 4 * factors)
    )
    return {
        "two_forwards": two,
        "products": longer(products + attention, 0),
        "unpack_once": longer(0, unpack),
        "gains": longer(0, 4 * outputs),  # read and written once more, in bf16
        "factors": longer(0, 4 * factors),
        "random_bits_on_cpu": 1e3 * factors / 64 / PHILOX_WORDS_PER_SECOND,
        "dense_scales": 3 * longer(0, 8 * linears.scales),  # shown twice, updated once
        "dense_random_bits_on_cpu": 1e3 * dense_bits / 64 / PHILOX_WORDS_PER_SECOND,
        "probes_over_two_forwards": probes / two,
        "dense_over_two_forwards": (two + 3 * longer(0, 8 * linears.scales)) / two,
        "tflop": (products + attention) / 1e12,
        "gb_moved_by_unpacking": unpack / 1e9,
    }


def table(rows: list[dict[str, Any]]) -> str:
    columns = {
        "TFLOP": ("tflop", ".0f"),
        "two forward passes, ms": ("two_forwards", ".0f"),
        "of it unpacking, ms": ("unpack_once", ".0f"),
        "scaling, ms": ("gains", ".1f"),
        "factors, ms": ("factors", ".1f"),
        "bits on one CPU core, ms": ("random_bits_on_cpu", ".1f"),
        "default / two passes": ("probes_over_two_forwards", ".3f"),
        "dense / two passes": ("dense_over_two_forwards", ".3f"),
    }
    lines = [
        "| card | side | batch | " + " | ".join(columns) + " |",
        "|---|---|---|" + "---|" * len(columns),
    ]
    for row in rows:
        values = " | ".join(format(row[key], digits) for key, digits in columns.values())
        lines.append(f"| {row['card']} | {row['side']} | {row['batch']} | {values} |")
    return "\n".join(lines)


def main() -> None:
    rows = [
        {"card": card.name, "side": side, "batch": batch} | costs(side, batch, card)
        for card in CARDS
        for side, batch in ((512, 1), (512, 8), (1024, 1))
    ]
    write_results("cost_model", {"computed_not_measured": True, "rows": rows})
    DOCUMENT.write_text(put_between_markers(DOCUMENT.read_text(), table(rows), BEGIN, END))


if __name__ == "__main__":
    main()
