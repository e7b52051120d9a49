"""Pipelines of full size without weights."""

import json
import shutil

import pytest
import torch

from qzo_diffusion.diffusion import text_encoders
from qzo_diffusion.diffusion.families.sd3 import SD3
from qzo_diffusion.diffusion.transformer import empty_transformer
from qzo_diffusion.resources import tiny_model
from tests.runs.style.full_size import CLIP_G, CLIP_L, LARGE, MEDIUM, T5, hollow


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Folders of SD3.5 Large and Medium by their transformers' widths."""
    from diffusers import AutoencoderKL

    root = tmp_path_factory.mktemp("hollow")
    vae_config = json.loads((tiny_model() / "vae" / "config.json").read_text()) | {
        "block_out_channels": [128, 256, 512, 512]
    }
    vae_config |= {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
    }
    vae_config |= {"norm_num_groups": 32}
    for name, config in {"large": LARGE, "medium": MEDIUM}.items():
        place = root / name
        hollow(
            place / "transformer",
            config,
            lambda config=config: empty_transformer(config),
            "diffusion_pytorch_model",
        )

        def empty_vae():
            with torch.device("meta"):
                return AutoencoderKL.from_config(vae_config)

        hollow(place / "vae", vae_config, empty_vae, "diffusion_pytorch_model")
        for part, settings in {
            "text_encoder": CLIP_L,
            "text_encoder_2": CLIP_G,
            "text_encoder_3": T5,
        }.items():
            (place / part).mkdir()
            (place / part / "config.json").write_text(json.dumps(settings))
            model = text_encoders.empty_text_encoder(place, part, SD3.texts.classes[part])
            shutil.rmtree(place / part)
            hollow(place / part, settings, lambda model=model: model)
        shutil.copy(tiny_model() / "model_index.json", place)
    return {json.dumps(LARGE): root / "large", json.dumps(MEDIUM): root / "medium"}
