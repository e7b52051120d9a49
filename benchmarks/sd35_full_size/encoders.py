"""Stage encoders: the three text encoders and the VAE, one after the other."""

import gc
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.full_size.weights import need_disk, status, write_synthetic
from benchmarks.resident import reset_peak
from benchmarks.sd35_full_size.model import CLIP_TOKENS, T5_TOKENS

T5_XXL = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
}
CLIP = {
    "text_encoder": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "text_encoder_2": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
    },
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

    from qzo_diffusion.diffusion import text_encoders, vae
    from qzo_diffusion.diffusion.families.sd3 import SD3
    from qzo_diffusion.quant.stream import Quantization

    t5 = T5_XXL | {"feed_forward_proj": "gated-gelu", "num_layers": min(24, layers)}
    parts = {
        name: shape | {"projection_dim": shape["hidden_size"]} for name, shape in CLIP.items()
    } | {"text_encoder_3": t5}
    place = folder / "encoders"
    need_disk(folder, 0.5 + 1.7 + 0.4 * t5["num_layers"])  # type: ignore[operator]
    for part, config in parts.items():
        if not (place / part / "config.json").is_file():
            (place / part).mkdir(parents=True, exist_ok=True)
            (place / part / "config.json").write_text(json.dumps(config))
            empty = text_encoders.empty_text_encoder(place, part, SD3.texts.classes[part])
            write_synthetic(empty, place / part, "model")
    if not (place / "vae").is_dir():
        blocks = {
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
        }
        latents = {
            "latent_channels": 16,
            "layers_per_block": 2,
            "sample_size": 1024,
            "shift_factor": 0.0609,
            "scaling_factor": 1.5305,
        }
        post = {"use_quant_conv": False, "use_post_quant_conv": False}
        AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), **blocks, **latents, **post
        ).save_pretrained(place / "vae")
    gc.collect()
    reset_peak()
    figures: dict[str, Any] = {}
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": torch.device("cpu")}
    for part in parts:
        how = Quantization() if part == "text_encoder_3" else None
        kind = SD3.texts.classes[part]
        encoder = text_encoders.load_text_encoder(place, part, kind, quantization=how, **options)
        if part == "text_encoder_3":
            text_encoders.t5_states(encoder, Ids(), ["a prompt"], T5_TOKENS)
        else:
            text_encoders.clip_states(encoder, Ids(), ["a prompt"])
        del encoder
        gc.collect()
        figures[f"{part}_peak_rss_gb"] = round(status("VmHWM"), 3)
    decoder = vae.load_vae(place, SD3, torch.device("cpu"), tile=512)
    latents = vae.image_encoder(decoder)(torch.zeros(1, 3, 512, 512))
    with torch.no_grad():
        decoder.decode(latents)
    return figures | {"encoders_peak_rss_gb": round(status("VmHWM"), 3)}
