"""Stage export: a tuned model as a file that plain diffusers loads."""

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from benchmarks.full_size.weights import need_disk, status
from benchmarks.sd35_full_size.model import batch_of, load_model


def export(folder: Path) -> dict[str, Any]:
    """Tune every scale a little, export, and load with plain diffusers in place of the tuned
    model.
    """
    from diffusers import SD3Transformer2DModel
    from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer

    from qzo_diffusion.core.noise import Direction
    from qzo_diffusion.core.parametrize import parametrize
    from qzo_diffusion.diffusion.families.family import model_loss
    from qzo_diffusion.diffusion.families.sd3 import SD3
    from qzo_diffusion.quant.bnb import quantization_config
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
        wanted = model_loss(SD3, model, batch, torch.bfloat16)
    target = folder / "nf4"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    tensors = pending_tensors(model)
    config = json.loads((folder / "transformer" / "config.json").read_text()) | {
        "quantization_config": quantization_config(model, "nf4", "bfloat16")
    }
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
            equal &= torch.equal(
                module.weight.data.view(-1), base[f"{name}.weight"].read().view(-1)
            )
    with torch.no_grad():
        got = model_loss(SD3, loaded, batch, torch.bfloat16)
    shutil.rmtree(target)
    return {
        "export_codes_equal": equal,
        "export_forward_equal": torch.equal(wanted, got),
        "export_peak_rss_gb": round(peak, 3),
        "losses": [float(wanted), float(got)],
    }
