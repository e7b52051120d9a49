"""Quantizers beside each other: errors, perplexity, and what QZO makes of each.

    python -m benchmarks.quantizers all --style-dir DIR --sst2 DIR --text FILE
        everything below; results/quantizers.json and the table in docs/formats.md
    python -m benchmarks.quantizers outputs
        relative errors of the weights of `tiny` and of its predictions on noise
    python -m benchmarks.quantizers perplexity --text FILE
        of SmolLM2-135M-Instruct on a text in UTF-8
    python -m benchmarks.quantizers style --style-dir DIR
        steps of QZO on captioned images: held-out loss, content score
    python -m benchmarks.quantizers sst2 --sst2 DIR
        steps of QZO on SST-2: held-out loss

Each verb replaces the figures of its formats, and leaves all others."""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.record import RESULTS, put_between_markers, update_results
from benchmarks.smollm2 import smollm2
from qzo_diffusion import resources
from qzo_diffusion.cli import main as command_line
from qzo_diffusion.diffusion.families.sd3 import SD3
from qzo_diffusion.quant.base import linears_to_quantize
from qzo_diffusion.quant.load import plain_layer
from qzo_diffusion.quant.svdquant import input_peaks, quantized_layer

DOCUMENT = Path(__file__).parents[1] / "docs" / "formats.md"
TABLE = ("<!-- table: python -m benchmarks.quantizers -->", "<!-- end of table -->")
VERBS = ("outputs", "perplexity", "style", "sst2")
TABLED = ("outputs", "style", "sst2")
STEPS = 200
WINDOW = 512  # tokens of one forward for perplexity
SHORT = ["data.max_tokens=64", "data.validation_examples=64", "data.test_examples=0"]
SHORT += ["compute.dtype=bfloat16"]
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
    "svdquant, W4A16, smoothed": of_svdquant(False, smooth=True),
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
def outputs(names: Sequence[str]) -> Iterator[tuple[str, dict[str, float]]]:
    """Relative errors of weights and of predictions on noise at eight levels, by format."""
    from diffusers import SD3Transformer2DModel

    folder, skip = resources.tiny_model() / "transformer", SD3.denoiser.skip

    def fresh() -> Any:
        return SD3Transformer2DModel.from_pretrained(folder).eval()

    exact = fresh()
    batch = noise(exact)
    wanted = exact(**batch).sample
    layers = [name for name, _ in linears_to_quantize(exact, skip, 64)]
    peaks = input_peaks(exact, layers, lambda: exact(**batch))
    for name in names:
        model = fresh()
        of_weights = quantized(model, skip, FORMATS[name], peaks)
        lost = (model(**noise(model, seed=1)).sample - exact(**noise(exact, seed=1)).sample).norm()
        yield name, {"weights": of_weights, "outputs": float(lost / wanted.norm())}


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
def perplexity(text: Path, most: int, names: Sequence[str]) -> Iterator[tuple[str, float]]:
    """exp of the mean loss of a token, in windows of `WINDOW` tokens, by format.

    Peaks of inputs are those of the window behind the ones that are scored.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, skip = smollm2(), ["lm_head"]
    ids = AutoTokenizer.from_pretrained(folder)(text.read_text("utf-8")).input_ids
    *windows, last = torch.tensor(ids[: (most + 1) * WINDOW]).split(WINDOW)

    def fresh() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def score(model: Any) -> float:
        losses = [
            F.cross_entropy(model(one[None]).logits[0, :-1], one[1:], reduction="none")
            for one in windows
        ]
        return float(torch.cat(losses).mean().exp())

    exact = fresh()
    layers = [name for name, _ in linears_to_quantize(exact, skip, 64)]
    peaks = input_peaks(exact, layers, lambda: exact(last[None]))
    yield "not quantized", score(exact)
    for name in names:
        model = fresh()
        quantized(model, skip, FORMATS[name], peaks)
        yield name, score(model)


def of_style(images: Path, steps: int, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Held-out losses and content scores of base and tuned `tiny`, by format."""
    for name, settings in trainable(names):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder, "run")
            more = ["--style-dir", str(images), "sample.every=0", *settings]
            train("train", run, steps, "--model", "tiny", *more)
            content = [content_of(run, one, Path(folder, one)) for one in ("0", "1")]
            yield name, {"steps": steps, "loss": held_out(run), "content": content}


def content_of(run: Path, strength: str, folder: Path) -> float:
    """The mean content score of the pictures of a run's own prompts."""
    score = folder.with_suffix(".json")
    call("sample", "--run", str(run), "--strength", strength, "--output-dir", str(folder))
    pictures = ["--images", str(folder / "samples"), "--scorer", "embedded"]
    call("evaluate", *pictures, "--output", str(score))
    return float(json.loads(score.read_text())["clip_score"]["mean"])


def of_sst2(data: Path, steps: int, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Held-out losses of base and tuned SmolLM2, by format."""
    places = ["--task", "sst2", "--model", str(smollm2()), "--data-dir", str(data)]
    for name, settings in trainable(names):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder, "run")
            train("llm train", run, steps, *places, *SHORT, *settings)
            yield name, {"steps": steps, "loss": held_out(run)}


def trainable(names: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Formats with the settings of a run, for those that have them."""
    for name in names:
        if (settings := FORMATS[name].settings) is not None:
            yield name, settings


def train(verb: str, run: Path, steps: int, *arguments: str) -> None:
    call(*verb.split(), "--output-dir", str(run), "--max-steps", str(steps), *arguments)


def call(*arguments: str) -> None:
    with redirect_stdout(sys.stderr):
        code = command_line(arguments)
    if code:
        raise RuntimeError(f"exit code {code} of {arguments[0]}")


def held_out(run: Path) -> list[float]:
    """The held-out loss of the base, and of the last step."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    return [losses[0], losses[-1]]


def table(figures: dict[str, Any]) -> str:
    """One row a format; – where nothing was measured."""
    heads = (
        "| format | weights | `tiny`'s predictions | SmolLM2's perplexity | style | content | "
        "SST-2 |"
    )
    rows = [heads, "|---|---|---|---|---|---|---|"]
    for name in ["not quantized", *FORMATS]:
        errors, style, task = (figures.get(key, {}).get(name, {}) for key in TABLED)
        cells = [percent(errors.get("weights")), percent(errors.get("outputs"))]
        value = figures.get("perplexity", {}).get(name)
        cells.append("–" if value is None else f"{value:.2f}")
        cells += [fall(style.get(key)) for key in ("loss", "content")]
        rows.append(f"| {' | '.join([name, *cells, fall(task.get('loss'))])} |")
    return "\n".join(rows)


def figures_of(verb: str, args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Name and figures of one format after another."""
    if verb == "outputs":
        return outputs(args.formats)
    if verb == "perplexity":
        return perplexity(args.text, args.windows, args.formats)
    if verb == "style":
        return of_style(args.style_dir, args.steps, args.formats)
    return of_sst2(args.sst2, args.steps, args.formats)


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"


def fall(losses: list[float] | None) -> str:
    return "–" if losses is None else f"{losses[0]:.4f} -> {losses[1]:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=("all", *VERBS, "report"))
    parser.add_argument("--style-dir", type=Path, help="captioned images")
    parser.add_argument("--sst2", type=Path, help="folder of train.tsv and dev.tsv")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--windows", type=int, default=40, help=f"of {WINDOW} tokens")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--formats", nargs="+", choices=tuple(FORMATS), default=tuple(FORMATS))
    args = parser.parse_args()
    wanted = VERBS if args.verb == "all" else tuple(one for one in VERBS if one == args.verb)
    needs = {"perplexity": "text", "style": "style_dir", "sst2": "sst2"}
    for verb in wanted:
        if (need := needs.get(verb)) and getattr(args, need) is None:
            parser.error(f"{verb} needs --{need.replace('_', '-')}")
    figures = json.loads((RESULTS / "quantizers.json").read_text())
    for verb in wanted:
        found = figures.setdefault(verb, {})
        for name, measured in figures_of(verb, args):
            found[name] = measured
            print(name, measured, file=sys.stderr)
            print(update_results("quantizers", verb, {verb: found}, {}))
    DOCUMENT.write_text(put_between_markers(DOCUMENT.read_text(), table(figures), *TABLE))


if __name__ == "__main__":
    main()
