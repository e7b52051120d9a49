"""Export a language model for `qzo-diffuse export`: a plain transformers folder in the quantizer's
own format.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from qzo_diffusion import devices
from qzo_diffusion.config.files import load_config
from qzo_diffusion.config.llm import LlmConfig
from qzo_diffusion.core.errors import ConfigError
from qzo_diffusion.core.parametrization import tuned_scales
from qzo_diffusion.llm.gguf_file import save_gguf
from qzo_diffusion.llm.stored import READ_HERE, bitsandbytes_type, save_stored, stored_method
from qzo_diffusion.quant.bnb import quantization_config
from qzo_diffusion.quant.gguf_header import is_gguf
from qzo_diffusion.quant.stored import pending_tensors
from qzo_diffusion.quant.weights import compare_tensors, write_tensors
from qzo_diffusion.runs.llm import card
from qzo_diffusion.runs.llm.methods import apply_, load_base
from qzo_diffusion.runs.llm.models import choose_lm
from qzo_diffusion.runs.locate import locate
from qzo_diffusion.runs.publish import published_config, published_facts
from qzo_diffusion.runs.tuned import load_scales
from qzo_diffusion.system.files import check_new, write_folder

WEIGHTS = "model.safetensors"
BITSANDBYTES = ("nf4", "fp4")
KNOWN_TO_LM_EVAL = ("sst2", "rte", "cb", "boolq")


def run(run_folder: Path, kind: str, output_dir: Path) -> dict[str, Any]:
    """Write `output_dir`, which `AutoModelForCausalLM.from_pretrained` loads.

    Returns the figures for `--json`.

    Raises:
        ConfigError: the format is for another kind of model, or the run's method or quantization
            has none.
        OutputError: `output_dir` exists, the disk has no room, or the export reads back different.
    """
    check_new(output_dir)
    config: LlmConfig = load_config(locate(run_folder).need("llm").settings(), LlmConfig)
    folder, _ = choose_lm(config.model)
    if config.method not in ("qzo", "fo-scales"):
        got = f"--format {kind} for a language model tuned by {config.method}"
        raise ConfigError(
            got, "a run of the method qzo or fo-scales, which tunes scales", "export another run"
        )
    if config.quant.transform != "none":
        raise ConfigError(
            f"--format {kind} for a run with quant.transform={config.quant.transform}",
            "quant.transform=none: no other program applies the maps of a forward pass",
            "qzo-diffuse llm evaluate --run RUN scores this one",
        )
    stored = is_gguf(folder) or stored_method(folder) in READ_HERE
    has = _format_of(config, folder)
    if not stored and has not in BITSANDBYTES:
        raise ConfigError(
            f"a run in {has}",
            "nf4 or fp4 of bitsandbytes, or a folder of GPTQ, AQLM or HQQ, or a GGUF file: "
            "there is no folder of another format",
            "qzo-diffuse llm evaluate --run RUN scores this one; to export, train an "
            "unquantized model with quant.type=nf4 "
            "quant.backend=bnb",
        )
    if kind not in ("native", has):
        raise ConfigError(
            f"--format {kind} for a run over a model in {has}",
            "--format native",
            "use --format native",
        )
    tuned, facts = load_scales(run_folder)
    device = devices.choose_device(config.compute.device)
    dtype = devices.choose_dtype(config.compute.dtype, device)
    base = load_base(config, folder, device, dtype)
    apply_(base, tuned, facts, run_folder)

    def fill(target: Path) -> None:
        if is_gguf(folder):
            save_gguf(folder, target, base.lm.model, tuned_scales(base.theta))
        elif stored:
            save_stored(folder, target, tuned_scales(base.theta), base.scales.weights)
        else:
            base.theta.merge_()
            _write_bitsandbytes(
                base.lm.model, has, folder, target, devices.dtype_name(dtype), facts
            )
        (target / "run.yaml").write_text(published_config(config), encoding="utf-8")
        card.write(target, run_folder, config, facts)

    write_folder(output_dir, fill)
    task = config.task if config.task in KNOWN_TO_LM_EVAL else "TASK"
    file = f",gguf_file={folder.name}" if is_gguf(folder) else ""
    command = f"lm_eval --model hf --model_args pretrained={output_dir}{file} --tasks {task}"
    size = sum(path.stat().st_size for path in output_dir.iterdir())
    return {"export": str(output_dir), "format": kind, "bytes": size, "lm_eval": command}


def _format_of(config: LlmConfig, folder: Path) -> str:
    """Return the format of the scales. A folder that is quantized keeps its own, whatever the
    settings say.
    """
    method = stored_method(folder)
    if method == "bitsandbytes":
        return bitsandbytes_type(folder)
    if method is not None:
        return method
    return (
        config.quant.type
        if config.quant.backend == "bnb"
        else f"{config.quant.type} of the back-end {config.quant.backend}"
    )


def _write_bitsandbytes(
    model: nn.Module, kind: str, source: Path, target: Path, dtype: str, facts: dict[str, str]
) -> None:
    """Copy everything but the source's weights, and write the 4-bit weights in bitsandbytes'
    layout.

    The result is compared bit for bit.
    """
    weights = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(weights) and file.name != "config.json":
            shutil.copyfile(file, target / file.name)
    tensors = pending_tensors(model)
    write_tensors(
        target / WEIGHTS, tensors, {"format": "pt", **published_facts(facts)}, lambda done: None
    )
    compare_tensors(target / WEIGHTS, tensors, lambda done: None)
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    settings["dtype"] = dtype
    settings["quantization_config"] = quantization_config(model, kind, dtype)
    (target / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
