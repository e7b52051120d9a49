"""Write the tables of docs/models.md: what each family needs, planned and computed, not measured.

python -m benchmarks.families.table
"""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cost_model import CARDS, Card
from benchmarks.record import put_between_markers, write_results
from qzo_diffusion.config.defaults import PROBES
from qzo_diffusion.config.files import make_config
from qzo_diffusion.diffusion import memory
from qzo_diffusion.diffusion.autoencoders import reduction
from qzo_diffusion.diffusion.families.family import Family
from qzo_diffusion.diffusion.families.registry import FAMILIES, published
from qzo_diffusion.diffusion.flow_matching import Batch
from qzo_diffusion.diffusion.memory import MemoryPlan
from qzo_diffusion.diffusion.pipeline_shape import PipelineShape, known_shape
from qzo_diffusion.diffusion.transformer import empty_transformer
from qzo_diffusion.quant.base import linears_to_quantize
from qzo_diffusion.runs.style import memory as planning
from qzo_diffusion.runs.style.pipeline import Runtime

DOCUMENT = Path(__file__).parents[2] / "docs/models.md"
BEGIN = "<!-- table: written by `python -m benchmarks.families.table` -->"
END = "<!-- end of table -->"
MODELS = (
    "stabilityai/stable-diffusion-3.5-large",
    "stabilityai/stable-diffusion-3.5-medium",
    "black-forest-labs/FLUX.1-dev",
    "black-forest-labs/FLUX.2-klein-base-4B",
    "Qwen/Qwen-Image",
    "stabilityai/stable-diffusion-xl-base-1.0",
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "Tongyi-MAI/Z-Image",
)
SIDES = (512, 1024)  # pixels
AT_ONCE = 8  # probes of an example that share a forward pass


def plan_of(name: str, side: int, at_once: int) -> MemoryPlan:
    """Return the memory plan of a default run on a GPU with T5 in NF4."""
    config = make_config(
        {
            "model": name,
            "data": {"resolution": side},
            "train": {"micro_batch_size": at_once},
            "sample": {"batch_size": 1},
        }
    )
    place = Runtime(Path(name), torch.device("cuda"), torch.bfloat16, known_shape(name))
    with mock.patch.object(memory, "available_bytes", return_value=None):
        return planning.memory_plan(config, place, images=20, prompts=30)


def planned_gigabytes(name: str) -> dict[str, float | None]:
    """Return planned peaks by size of the picture and what is computed at once; None where there is
    no plan of gradients."""
    found: dict[str, float | None] = {}
    for side in SIDES:
        plans = {count: plan_of(name, side, count) for count in (1, AT_ONCE)}
        found |= {f"{side}, {count} at once": plan.peak for count, plan in plans.items()}
        gradients = plans[1].methods.get("fo-scales")
        found[f"{side}, gradients"] = gradients and gradients.whole
    return {key: peak and round(peak / 1e9, 2) for key, peak in found.items()}


@dataclass(frozen=True)
class Cost:
    """Of one forward pass of one example. weights, scales: of quantized layers."""

    flops: float
    weights: int
    scales: int


def cost(family: Family, shape: PipelineShape, side: int) -> Cost:
    model = empty_transformer(shape.transformer.config)
    sizes = family.denoiser.shape(shape.transformer.config)
    latents = torch.empty(
        1, sizes.channels, *(side // reduction(shape.vae.config),) * 2, device="meta"
    )
    embeds = torch.empty(1, family.texts.tokens(None), sizes.text_width, device="meta")
    batch = Batch(latents, latents, torch.full((1,), 0.5), embeds, _pooled(shape))
    with FlopCounterMode(display=False) as counter:
        family.denoiser.predict(model, _of_family(batch, family), torch.float32)
    weights = sum(
        linear.weight.numel() for _, linear in linears_to_quantize(model, family.denoiser.skip, 64)
    )
    return Cost(float(counter.get_total_flops()), weights, weights // 64)


def _pooled(shape: PipelineShape) -> torch.Tensor:
    config = shape.transformer.config
    width = config.get("pooled_projection_dim")
    if width is None and config.get("addition_embed_type") == "text_time":
        width = shape.encoders["text_encoder_2"].config["projection_dim"]
    return torch.empty(1, width or 0, device="meta")


def _of_family(batch: Batch, family: Family) -> Batch:
    """Return the batch on the meta device with the family's objective."""
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    objective = family.objective(SimpleNamespace(config=schedule))
    return replace(batch.to(torch.device("meta")), objective=objective)


def seconds_of_a_step(one: Cost, card: Card) -> float:
    """Return the time of products, and of dequantizing once for so many probes."""
    products = PROBES * one.flops / card.flops
    # codes and scales are read, weights in 16 bits written and read
    unpacking = one.weights * (0.5 + 2 + 2) + one.scales * 4
    return products + PROBES / AT_ONCE * unpacking / card.bandwidth


def rows() -> list[dict[str, Any]]:
    found = []
    for name in MODELS:
        shape, family = known_shape(name), published(name)
        assert shape is not None
        assert family is not None
        of_sides = {side: cost(family[0], shape, side) for side in SIDES}
        found.append(
            {
                "model": name,
                "family": family[0].name,
                "quantized_weights": of_sides[512].weights,
                "planned_gb": planned_gigabytes(name),
                "tflop": {side: round(one.flops / 1e12, 2) for side, one in of_sides.items()},
                "seconds_of_a_step_at_512": {
                    card.name: round(seconds_of_a_step(of_sides[512], card), 1) for card in CARDS
                },
            }
        )
    return found


def table(found: list[dict[str, Any]]) -> str:
    head = ["model", "`--family`", "weights in 4 bits"]
    head += [f"GB at {key}" for key in found[0]["planned_gb"]]
    head += [f"s a step, {card.name}" for card in CARDS]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in found:
        cells = [f"`{row['model']}`", row["family"], f"{row['quantized_weights'] / 1e9:.2f} B"]
        cells += ["-" if one is None else f"{one:.1f}" for one in row["planned_gb"].values()]
        cells += [f"{value:.1f}" for value in row["seconds_of_a_step_at_512"].values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    found = rows()
    assert {row["family"] for row in found} == {family.name for family in FAMILIES}
    write_results("models", {"computed_not_measured": True, "rows": found})
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(put_between_markers(text, table(found), BEGIN, END), encoding="utf-8")


if __name__ == "__main__":
    main()
