"""Stable Diffusion 3.5 Large at full size on a CPU: `OMP_NUM_THREADS=2 python -m benchmarks.sd35_full_size`.

The weights are gated, so these are synthetic ones in the real shapes: 8,056,627,520 parameters, 16 GB of bf16 in shards, streamed
from disk through the path that a user's download takes. Stages, each a process of its own with figures of its own, so that a run
that was stopped goes on (`--stages`):

    shards     write the transformer in bf16 shards to --folder (16 GB)
    load       stream and quantize; peak of the resident set; store the 4-bit copy (4.8 GB)
    restart    load the copy, against reading the same bytes
    steps      two plain forwards, then ten steps of the default method and ten dense ones, at 256 px and batch 1
    export     nf4: packed codes equal to the base's, and a forward equal to the tuned model's
    encoders   T5-XXL in NF4, CLIP-G, CLIP-L and the VAE at full size, one after the other, at 512 px

Memory is VmHWM in units of 1e9 bytes, imports included; it is reset through /proc/self/clear_refs before the steps. `--layers N`
is the same in small. About 30 GB of disk are needed and checked for; `--clean` removes them at the end.
"""

import argparse
import gc
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.record import write_results
from benchmarks.resident import reset_peak, resident

STAGES = ("shards", "load", "restart", "steps", "export", "encoders")
DEFAULT_FOLDER = Path.home() / ".cache" / "qzo_diffusion" / "sd35_full_size"
LARGE = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 38,
    "attention_head_dim": 64,
    "num_attention_heads": 38,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 2432,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "dual_attention_layers": [],
    "qk_norm": "rms_norm",
}
SHARD = 4e9  # bytes
T5_TOKENS, CLIP_TOKENS = 256, 77


def status(field: str) -> float:
    """GB of a field of /proc/self/status."""
    return resident(field) / 1e9


def need_disk(folder: Path, gigabytes: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free / 1e9
    if free < gigabytes:
        sys.exit(f"{folder}: {free:.1f} GB free, {gigabytes:.1f} needed; give another --folder or free some space")


def synthetic(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Normal numbers as an initialized layer has; norms at one. A million are drawn and repeated: drawing 8e9 takes minutes."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    drawn = torch.randn(min(2**20 + 7, math.prod(shape)), generator=generator) / math.sqrt(math.prod(shape[1:]))
    repeats = -(-math.prod(shape) // drawn.numel())
    return drawn.to(dtype).repeat(repeats)[: math.prod(shape)].view(shape)


def write_synthetic(model: nn.Module, folder: Path, stem: str, dtype: torch.dtype = torch.bfloat16) -> int:
    """Shards and their index for every tensor of a model on the meta device. Returns the number of parameters."""
    from qzo_diffusion.quant.weights import Pending, write_tensors

    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, Pending]] = [{}]
    filled = 0.0
    for name, tensor in model.state_dict().items():
        size = tensor.numel() * dtype.itemsize
        if filled and filled + size > SHARD:
            shards.append({})
            filled = 0.0
        shape = tuple(tensor.shape)
        shards[-1][name] = Pending(dtype, shape, lambda shape=shape: synthetic(shape, generator, dtype))  # type: ignore[misc]
        filled += size
    names = [f"{stem}-{index + 1:05d}-of-{len(shards):05d}.safetensors" for index in range(len(shards))]
    folder.mkdir(parents=True, exist_ok=True)
    for name, shard in zip(names, shards, strict=True):
        write_tensors(folder / name, shard, {})
        print("wrote", folder / name, file=sys.stderr)
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(parameter.numel() for parameter in model.parameters())


def config_of(layers: int) -> dict[str, Any]:
    return LARGE | {"num_layers": layers}


def shards(folder: Path, layers: int) -> dict[str, Any]:
    from qzo_diffusion.diffusion.transformer import empty_transformer

    config = config_of(layers)
    model = empty_transformer(config)
    need_disk(folder, 2.1e-9 * sum(tensor.numel() for tensor in model.state_dict().values()))
    started = time.perf_counter()
    place = folder / "transformer"
    count = write_synthetic(model, place, "diffusion_pytorch_model")
    (place / "config.json").write_text(json.dumps(config, indent=1))
    return {"parameters": count, "seconds": round(time.perf_counter() - started, 1)}


def load_model(folder: Path, cache: Path | None) -> nn.Module:
    from qzo_diffusion.config import QuantConfig
    from qzo_diffusion.diffusion.transformer import empty_transformer, find_transformer
    from qzo_diffusion.loading import Source, load_quantized
    from qzo_diffusion.quant.stream import Quantization

    found = find_transformer(folder / "transformer")
    source = Source(found.entries, lambda: empty_transformer(found.config))
    how = Quantization(skip=tuple(QuantConfig().skip))
    options = {"dtype": torch.bfloat16, "device": torch.device("cpu"), "cache": cache, "smallest_cached": 0}
    return load_quantized(source, how, **options)  # type: ignore[arg-type]


def import_everything() -> None:
    """As a run does; the empty model also makes diffusers import what it needs."""
    import bitsandbytes  # noqa: F401

    from qzo_diffusion.diffusion.transformer import empty_transformer

    empty_transformer(config_of(1))


def load(folder: Path, layers: int) -> dict[str, Any]:
    need_disk(folder, 0.13 * layers)
    import_everything()
    imports = status("VmRSS")
    shutil.rmtree(folder / "copies", ignore_errors=True)
    started = time.perf_counter()
    model = load_model(folder, folder / "copies")
    return {
        "load_peak_rss_gb": round(status("VmHWM"), 3),
        "load_imports_gb": round(imports, 3),
        "load_resident_gb": round(status("VmRSS"), 3),
        "load_and_store_seconds": round(time.perf_counter() - started, 1),
        "stored_gb": round(sum(f.stat().st_size for f in (folder / "copies").rglob("*.safetensors")) / 1e9, 3),
        "logical_parameters": logical_parameters(model),
    }


def logical_parameters(model: nn.Module) -> int:
    """A 4-bit weight counts as the numbers that it stands for."""
    total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        total += parameter.numel() if state is None else math.prod(state.shape)
    return total


def restart(folder: Path, rounds: int = 3) -> dict[str, Any]:
    import_everything()
    (file,) = (folder / "copies").rglob("*.safetensors")
    load_model(folder, folder / "copies")  # into the page cache, for both sides
    loads, reads = [], []
    for _ in range(rounds):
        started = time.perf_counter()
        data = file.read_bytes()
        reads.append(time.perf_counter() - started)
        del data
        started = time.perf_counter()
        model = load_model(folder, folder / "copies")
        loads.append(time.perf_counter() - started)
        del model
        gc.collect()
    return {
        "second_start_over_read": round(statistics.median(loads) / statistics.median(reads), 3),
        "second_start_seconds": round(statistics.median(loads), 2),
        "read_seconds": round(statistics.median(reads), 2),
        "second_start_bytes": file.stat().st_size,
    }


def batch_of(model: Any, side: int, count: int = 1) -> Any:
    from qzo_diffusion.diffusion.flow_matching import Batch

    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(count, 16, side // 8, side // 8, generator=generator) for _ in range(2))
    embeds = torch.randn(count, CLIP_TOKENS + T5_TOKENS, model.config.joint_attention_dim, generator=generator)
    pooled = torch.randn(count, model.config.pooled_projection_dim, generator=generator)
    return Batch(latents, noise, torch.full((count,), 0.5), embeds, pooled)


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def steps(folder: Path, count: int) -> dict[str, Any]:
    """Inference first, then steps in the same process: the default method, and dense Rademacher signs without momentum."""
    import tempfile

    from qzo_diffusion import build
    from qzo_diffusion.config import make_config
    from qzo_diffusion.core.journal import JournalWriter
    from qzo_diffusion.diffusion.flow_matching import divisor_up_to, patches, velocity_loss
    from qzo_diffusion.train.checkpoint import entry_of
    from qzo_diffusion.train.loop import StepBatch, train_step_

    import_everything()
    imports = status("VmRSS")
    model = load_model(folder, folder / "copies")
    batch = batch_of(model, 256)

    def objective(one: Any) -> Tensor:
        return velocity_loss(model, one, torch.bfloat16)

    @torch.no_grad()
    def two_forwards() -> None:
        objective(batch).sum().item()
        objective(batch).sum().item()

    two_forwards()
    loaded_peak = status("VmHWM")
    reset_peak()
    forwards = [timed(two_forwards)]
    inference_peak = status("VmHWM")
    figures: dict[str, Any] = {"inference_peak_rss_gb": round(inference_peak, 3), "loaded_peak_rss_gb": round(loaded_peak, 3)}
    for name, settings in {"default": {}, "dense": {"qzo": {"parametrization": "dense", "num_directions": 1}}}.items():
        # What this file proves is memory and time, so no step moves a scale further than rounding.
        config = make_config(settings | {"train": {"lr": 1e-9, "micro_batch_size": 1}})
        _, numbers = build.scales_and_numbers(config, model)
        regions = divisor_up_to(config.qzo.regions, patches(batch.latents))
        mine = replace(batch, regions=regions)
        optimizer, probing = build.optimizer(config), build.probing(config)
        times: list[float] = []
        ratios: list[float] = []
        with tempfile.TemporaryDirectory() as place:
            journal = JournalWriter.create(Path(place) / "journal.qzo", {})
            reset_peak()
            for step in range(count):
                started = time.perf_counter()
                record = train_step_(objective, StepBatch([mine], regions=regions), numbers, optimizer, probing, 1e-9, step)
                journal.append(entry_of(record, 0))
                times.append(time.perf_counter() - started)
                if step == 0:
                    peak = status("VmHWM")
                peak = max(peak, status("VmHWM"))
                forwards.append(timed(two_forwards))
                ratios.append(times[-1] / forwards[-1])
            journal.close()
        figures[name] = {
            "step_peak_rss_gb": round(peak, 3),
            "memory_over_inference": round(peak / inference_peak, 4),
            "memory_over_inference_above_imports": round((peak - imports) / (inference_peak - imports), 4),
            "step_over_two_forwards": round(statistics.median(ratios), 4),
            "step_seconds": round(statistics.median(times), 2),
            "steps": count,
        }
        del numbers, optimizer
        print(name, figures[name], file=sys.stderr)
    figures["two_forwards_seconds"] = round(statistics.median(forwards), 2)
    for key in ("step_peak_rss_gb", "memory_over_inference", "step_over_two_forwards"):
        figures[key] = max(figures[name][key] for name in ("default", "dense"))  # the worse of the two
    figures["step_peak_rss_gb"] = max(figures["step_peak_rss_gb"], round(loaded_peak, 3))
    return figures


def export(folder: Path) -> dict[str, Any]:
    """Tune every scale a little, export, and load with plain diffusers in place of the tuned model."""
    from diffusers import SD3Transformer2DModel
    from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer

    from qzo_diffusion.core.noise import Direction
    from qzo_diffusion.core.parametrize import parametrize
    from qzo_diffusion.diffusion.flow_matching import velocity_loss
    from qzo_diffusion.quant.load import find_scales
    from qzo_diffusion.quant.stored import pending_tensors
    from qzo_diffusion.quant.weights import compare_tensors, read_entries, write_tensors

    (stored,) = (folder / "copies").rglob("*.safetensors")
    base = read_entries(stored)
    need_disk(folder, 1.05e-9 * stored.stat().st_size)
    model: Any = load_model(folder, folder / "copies")
    parametrize(find_scales(model), "dense").move_([Direction(0, 0)], [1e-2])
    batch = batch_of(model, 256)
    with torch.no_grad():
        wanted = velocity_loss(model, batch, torch.bfloat16)
    target = folder / "nf4"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    tensors = pending_tensors(model)
    skipped = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    quantization |= {"bnb_4bit_use_double_quant": False, "bnb_4bit_compute_dtype": "bfloat16", "llm_int8_skip_modules": skipped}
    config = json.loads((folder / "transformer" / "config.json").read_text()) | {"quantization_config": quantization}
    (target / "config.json").write_text(json.dumps(config))
    file = target / "diffusion_pytorch_model.safetensors"
    write_tensors(file, tensors, {})
    compare_tensors(file, tensors)
    peak = status("VmHWM")
    del model, tensors
    gc.collect()

    # Diffusers refuses a machine without a GPU, although bitsandbytes runs there.
    BnB4BitDiffusersQuantizer.validate_environment = lambda self, *args, **options: None
    loaded = SD3Transformer2DModel.from_pretrained(target, dtype=torch.bfloat16, device_map="cpu")
    equal = True
    for name, module in loaded.named_modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
            equal &= torch.equal(module.weight.data.view(-1), base[f"{name}.weight"].read().view(-1))
    with torch.no_grad():
        got = velocity_loss(loaded, batch, torch.bfloat16)
    shutil.rmtree(target)
    return {
        "export_codes_equal": equal,
        "export_forward_equal": torch.equal(wanted, got),
        "export_peak_rss_gb": round(peak, 3),
        "losses": [float(wanted), float(got)],
    }


T5_XXL = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128}
CLIP = {
    "text_encoder": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "text_encoder_2": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20},
}


class Ids:
    """In place of a tokenizer, whose words don't matter here."""

    model_max_length = CLIP_TOKENS

    def __call__(self, prompt: str, max_length: int, **options: Any) -> Any:
        from types import SimpleNamespace

        return SimpleNamespace(input_ids=torch.arange(1, max_length + 1).unsqueeze(0))


def encoders(folder: Path, layers: int) -> dict[str, Any]:
    """All four parts at full size, written and then loaded as a run does, one after the other."""
    from diffusers import AutoencoderKL

    from qzo_diffusion.diffusion import sd3, text_encoders
    from qzo_diffusion.quant.stream import Quantization

    t5 = T5_XXL | {"feed_forward_proj": "gated-gelu", "num_layers": min(24, layers)}
    parts = {name: shape | {"projection_dim": shape["hidden_size"]} for name, shape in CLIP.items()} | {"text_encoder_3": t5}
    place = folder / "encoders"
    need_disk(folder, 0.5 + 1.7 + 0.4 * t5["num_layers"])  # type: ignore[operator]
    for part, config in parts.items():
        if not (place / part / "config.json").is_file():
            (place / part).mkdir(parents=True, exist_ok=True)
            (place / part / "config.json").write_text(json.dumps(config))
            write_synthetic(text_encoders.empty_text_encoder(place, part), place / part, "model")
    if not (place / "vae").is_dir():
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        latents = {
            "latent_channels": 16,
            "layers_per_block": 2,
            "sample_size": 1024,
            "shift_factor": 0.0609,
            "scaling_factor": 1.5305,
        }
        post = {"use_quant_conv": False, "use_post_quant_conv": False}
        AutoencoderKL(block_out_channels=(128, 256, 512, 512), **blocks, **latents, **post).save_pretrained(place / "vae")
    gc.collect()
    reset_peak()
    figures: dict[str, Any] = {}
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": torch.device("cpu")}
    for part in parts:
        how = Quantization() if part == "text_encoder_3" else None
        encoder = text_encoders.load_text_encoder(place, part, quantization=how, **options)
        if part == "text_encoder_3":
            text_encoders.t5_states(encoder, Ids(), ["a prompt"], T5_TOKENS)
        else:
            text_encoders.clip_states(encoder, Ids(), ["a prompt"])
        del encoder
        gc.collect()
        figures[f"{part}_peak_rss_gb"] = round(status("VmHWM"), 3)
    vae = sd3.load_vae(place, torch.device("cpu"), tile=512)
    latents = sd3.image_encoder(vae)(torch.zeros(1, 3, 512, 512))
    with torch.no_grad():
        vae.decode(latents)
    return figures | {"encoders_peak_rss_gb": round(status("VmHWM"), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="where shards, the copy and exports go")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--layers", type=int, default=LARGE["num_layers"], help="fewer for a smoke test; nothing is recorded then")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--clean", action="store_true", help="remove --folder at the end")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_process:
        print(json.dumps(run_stage(args.stages[0], args)))
        return
    figures_file = args.folder / "figures.json"
    figures = json.loads(figures_file.read_text()) if figures_file.is_file() else {}
    if figures.get("layers") not in (None, args.layers):
        sys.exit(f"{args.folder} holds {figures['layers']} layers; give another --folder or remove it")
    for stage in args.stages:
        # A process each: the peak of one must not hide that of another.
        command = [sys.executable, "-m", "benchmarks.sd35_full_size", "--in-process", "--stages", stage]
        command += ["--folder", str(args.folder), "--layers", str(args.layers), "--steps", str(args.steps)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ).stdout
        figures |= {"layers": args.layers, stage: json.loads(output.strip().splitlines()[-1])}
        args.folder.mkdir(parents=True, exist_ok=True)
        figures_file.write_text(json.dumps(figures, indent=1))
        print(stage, figures[stage], file=sys.stderr)
    if args.layers == LARGE["num_layers"]:
        top = {key: figures[stage][key] for stage, keys in TOP.items() if stage in figures for key in keys}
        print(write_results("sd35_full_size", top | {"stages": figures}))
    if args.clean:
        shutil.rmtree(args.folder)


TOP = {
    "shards": ("parameters",),
    "load": ("load_peak_rss_gb",),
    "restart": ("second_start_over_read",),
    "steps": ("step_peak_rss_gb", "step_over_two_forwards", "memory_over_inference"),
    "export": ("export_codes_equal", "export_forward_equal", "export_peak_rss_gb"),
    "encoders": ("encoders_peak_rss_gb",),
}


def run_stage(stage: str, args: argparse.Namespace) -> dict[str, Any]:
    if stage == "steps":
        return steps(args.folder, args.steps)
    if stage in ("shards", "load", "encoders"):
        return {"shards": shards, "load": load, "encoders": encoders}[stage](args.folder, args.layers)
    return {"restart": restart, "export": export}[stage](args.folder)


if __name__ == "__main__":
    main()
