"""Quantizers beside each other: errors, perplexity, and what QZO makes of each.

    python -m benchmarks.quantizers all --style-dir DIR --sst2 DIR --text FILE
        everything below; results/quantizers.json and the table in docs/formats.md
    python -m benchmarks.quantizers outputs
        relative errors of the weights of `tiny` and of its predictions on noise
    python -m benchmarks.quantizers perplexity --text FILE
        of SmolLM2-135M-Instruct on a text in UTF-8
    python -m benchmarks.quantizers runs --style-dir DIR --sst2 DIR
        200 steps of QZO on a style and on SST-2: held-out loss, content score, accuracy

Each verb replaces its own part of the results."""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.record import RESULTS, put_between_markers, write_results
from benchmarks.smollm2 import smollm2
from qzo_diffusion import resources
from qzo_diffusion.diffusion.families.sd3 import SD3
from qzo_diffusion.quant.base import linears_to_quantize
from qzo_diffusion.quant.load import plain_layer
from qzo_diffusion.quant.svdquant import input_peaks, quantized_layer

DOCUMENT = Path(__file__).parents[1] / "docs" / "formats.md"
TABLE = ("<!-- table: python -m benchmarks.quantizers -->", "<!-- end of table -->")
STEPS = 200
WINDOW = 512  # tokens of one forward for perplexity
MakeLayer = Callable[[nn.Linear, Tensor | None], nn.Module]


@dataclass(frozen=True)
class Format:
    """A way to quantize a linear, and the settings of a run on it; None where there is none."""

    make: MakeLayer
    settings: tuple[str, ...] | None = None


def of_blocks(kind: Any, blocksize: int) -> Format:
    settings = ("quant.backend=reference", f"quant.type={kind}", f"quant.blocksize={blocksize}")
    return Format(lambda linear, peaks: plain_layer(linear, kind, blocksize), settings)


def of_svdquant(rounds: bool, rank: int = 32, smooth: bool = False) -> Format:
    def make(linear: nn.Linear, peaks: Tensor | None) -> nn.Module:
        known = peaks if smooth else None
        return quantized_layer(
            linear.weight, linear.bias, 64, rounds_inputs=rounds, peaks=known, rank=rank
        )

    if smooth or not rank:
        return Format(make)
    return Format(
        make, ("quant.type=svdquant", f"quant.activations={'int4' if rounds else 'float'}")
    )


FORMATS = {
    f"{kind}, blocks of {size}": of_blocks(kind, size)
    for size in (32, 64)
    for kind in ("nf4", "fp4", "bof4", "bof4s")
} | {
    "int4, W4A16": of_svdquant(False, rank=0),
    "int4, W4A4": of_svdquant(True, rank=0),
    "svdquant, W4A16": of_svdquant(False),
    "svdquant, W4A4": of_svdquant(True),
    "svdquant, W4A4, smoothed": of_svdquant(True, smooth=True),
}


def quantized(
    model: nn.Module, skip: Sequence[str], how: Format, peaks: dict[str, Tensor] | None = None
) -> float:
    """Quantize in place; return the relative error of all weights together."""
    lost = whole = 0.0
    for name in [name for name, _ in linears_to_quantize(model, skip, 64)]:
        parent, _, child = name.rpartition(".")
        linear: Any = model.get_submodule(name)
        layer: Any = how.make(linear, None if peaks is None else peaks[name])
        weight = linear.weight.detach().double()
        lost += float((_weight_of(layer).double() - weight).square().sum())
        whole += float(weight.square().sum())
        setattr(model.get_submodule(parent), child, layer)
    return math.sqrt(lost / whole)


def _weight_of(layer: Any) -> Tensor:
    if hasattr(layer, "dequantized"):
        return layer.dequantized()
    from qzo_diffusion.quant.reference import ReferenceHandle

    return ReferenceHandle("layer", layer).dequantized()


@torch.no_grad()
def outputs() -> dict[str, dict[str, float]]:
    """Relative errors of weights and of predictions on noise at eight levels, by format."""
    from diffusers import SD3Transformer2DModel

    folder, skip = resources.tiny_model() / "transformer", SD3.denoiser.skip

    def fresh() -> Any:
        return SD3Transformer2DModel.from_pretrained(folder).eval()

    exact = fresh()
    batch = noise(exact)
    wanted = exact(**batch).sample
    names = [name for name, _ in linears_to_quantize(exact, skip, 64)]
    peaks = input_peaks(exact, names, lambda: exact(**batch))
    found = {}
    for name, how in FORMATS.items():
        model = fresh()
        of_weights = quantized(model, skip, how, peaks)
        lost = (model(**noise(model, seed=1)).sample - exact(**noise(exact, seed=1)).sample).norm()
        found[name] = {"weights": of_weights, "outputs": float(lost / wanted.norm())}
        print(name, found[name], file=sys.stderr)
    return found


def noise(model: Any, seed: int = 0) -> dict[str, Tensor]:
    """Random latents and random prompts, the timesteps from low to high noise."""
    generator, config = torch.Generator().manual_seed(seed), model.config

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "hidden_states": drawn(8, config.in_channels, config.sample_size, config.sample_size),
        "encoder_hidden_states": drawn(8, 32, config.joint_attention_dim),
        "pooled_projections": drawn(8, config.pooled_projection_dim),
        "timestep": torch.linspace(50, 950, 8),
    }


@torch.no_grad()
def perplexity(text: Path, most: int) -> dict[str, float]:
    """exp of the mean loss of a token, in windows of `WINDOW` tokens, by format."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2()
    ids = AutoTokenizer.from_pretrained(folder)(text.read_text("utf-8")).input_ids
    windows = torch.tensor(ids[: most * WINDOW]).split(WINDOW)
    found = {}
    for name, how in {"not quantized": None, **FORMATS}.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        if how is not None:
            quantized(model, ["lm_head"], how)
        losses = [
            F.cross_entropy(model(one[None]).logits[0, :-1], one[1:], reduction="none")
            for one in windows
        ]
        found[name] = float(torch.cat(losses).mean().exp())
        print(name, found[name], file=sys.stderr)
    return found


def runs(style_dir: Path, sst2: Path, steps: int) -> dict[str, dict[str, Any]]:
    """Figures of a run on a style and of one on SST-2, for every format that has settings."""
    found: dict[str, dict[str, Any]] = {}
    for name, how in FORMATS.items():
        if how.settings is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            style, task = Path(folder, "style"), Path(folder, "sst2")
            common = ["--max-steps", str(steps), *how.settings]
            images = ["--model", "tiny", "--style-dir", str(style_dir), "sample.every=0"]
            call("train", *images, "--output-dir", str(style), *common)
            call("evaluate", "--run", str(style), "--output", str(style / "score.json"))
            texts = ["--task", "sst2", "--model", str(smollm2()), "--data-dir", str(sst2)]
            call("llm", "train", *texts, "--output-dir", str(task), *common)
            score = json.loads((style / "score.json").read_text())
            found[name] = {
                "style_loss": list(held_out(style)),
                "content": {
                    key: score["clip_score"][key] for key in ("mean", "base_mean", "delta_ci95")
                },
                "sst2_loss": list(held_out(task)),
            }
        print(name, found[name], file=sys.stderr)
    return found


def call(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "qzo_diffusion.cli", *arguments], check=True)


def held_out(run: Path) -> Iterator[float]:
    """The held-out loss of the base, and of the last step."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    yield from (losses[0], losses[-1])


def table(figures: dict[str, Any]) -> str:
    """One row a format; – where nothing was measured."""
    heads = "| format | weights | `tiny`'s predictions | SmolLM2's perplexity | style | SST-2 |"
    rows = [heads, "|---|---|---|---|---|---|"]
    for name in ["not quantized", *FORMATS]:
        errors = figures.get("outputs", {}).get(name, {})
        ran = figures.get("runs", {}).get(name, {})
        cells = [percent(errors.get("weights")), percent(errors.get("outputs"))]
        value = figures.get("perplexity", {}).get(name)
        cells.append("–" if value is None else f"{value:.2f}")
        cells += [fall(ran.get(key)) for key in ("style_loss", "sst2_loss")]
        rows.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(rows)


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"


def fall(losses: list[float] | None) -> str:
    return "–" if losses is None else f"{losses[0]:.4f} -> {losses[1]:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=("all", "outputs", "perplexity", "runs", "report"))
    parser.add_argument("--style-dir", type=Path, help="captioned images")
    parser.add_argument("--sst2", type=Path, help="folder of train.tsv and dev.tsv")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--windows", type=int, default=40, help=f"of {WINDOW} tokens")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    wanted = ("outputs", "perplexity", "runs") if args.verb == "all" else (args.verb,)
    needs = {"perplexity": ("text",), "runs": ("style_dir", "sst2")}
    for need in (need for verb in wanted for need in needs.get(verb, ())):
        if getattr(args, need) is None:
            parser.error(f"{args.verb} needs --{need.replace('_', '-')}")
    file = RESULTS / "quantizers.json"
    before = json.loads(file.read_text()) if file.is_file() else {}
    figures = {key: before[key] for key in ("outputs", "perplexity", "runs") if key in before}
    if "outputs" in wanted:
        figures["outputs"] = outputs()
    if "perplexity" in wanted:
        figures["perplexity"] = perplexity(args.text, args.windows)
    if "runs" in wanted:
        figures["runs"] = runs(args.style_dir, args.sst2, args.steps)
    if args.verb != "report":
        print(write_results("quantizers", figures))
    DOCUMENT.write_text(put_between_markers(DOCUMENT.read_text(), table(figures), *TABLE))


if __name__ == "__main__":
    main()
