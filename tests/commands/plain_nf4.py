"""A pipeline that diffusers and bitsandbytes loaded in 4 bits by themselves."""

import torch

from qzo_diffusion.diffusion.families.sd3 import SD3


def plain_nf4(folder, config, monkeypatch):
    """The pipeline in `folder` with the layers of a run's config in NF4, as a user would load it.

    Diffusers refuses 4-bit models on a machine without a GPU, although bitsandbytes runs there.
    """
    from diffusers import BitsAndBytesConfig, SD3Transformer2DModel, StableDiffusion3Pipeline
    from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer

    monkeypatch.setattr(
        BnB4BitDiffusersQuantizer, "validate_environment", lambda self, *args, **options: None
    )
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quant.type,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=list(SD3.denoiser.skip),
    )
    transformer = SD3Transformer2DModel.from_pretrained(
        folder,
        subfolder="transformer",
        quantization_config=how,
        dtype=torch.float32,
        device_map="cpu",
    )
    absent = dict.fromkeys(("vae", "scheduler"))
    for part in ("text_encoder", "tokenizer"):
        absent |= dict.fromkeys(f"{part}{number}" for number in ("", "_2", "_3"))
    return StableDiffusion3Pipeline(transformer=transformer.eval(), **absent)
