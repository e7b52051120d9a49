"""How to load each format of an export, for its card, in Markdown."""

from typing import Literal

Format = Literal["nf4", "bf16", "lora", "delta", "journal", "native"]
Layout = Literal["diffusers", "original", "both"]
DIFFUSERS_FILE, ORIGINAL_FILE = "diffusion_pytorch_model.safetensors", "original_layout.safetensors"

NEEDS_GPU = (
    'diffusers loads 4-bit folders on a GPU only; elsewhere it stops with "No GPU found". Without '
    "one, take an export in bf16, or sample with qzo-diffuse."
)
USE: dict[Format, str] = {
    "nf4": "A diffusers transformer in bitsandbytes' 4-bit layout, the size of the 4-bit base:\n\n"
    '```python\ntransformer = SD3Transformer2DModel.from_pretrained("this folder", '
    "dtype=torch.bfloat16)\n```\n\n"
    "Give it to `StableDiffusion3Pipeline.from_pretrained(base, transformer=transformer)`. "
    f"{NEEDS_GPU}",
    "bf16": "",  # see USE_OF_LAYOUT
    "lora": "A LoRA for the base model. The change of a run has a high rank, so a LoRA holds a "
    "part of it alone:\n\n"
    '```python\npipe.load_lora_weights("this folder")\n```\n\n'
    "ComfyUI reads the same file (`models/loras/`, node `Load LoRA`).",
    "delta": "The changes of the scales alone, to be applied to the base model:\n\n"
    "```\nqzo-diffuse sample --run THIS_FOLDER --strength 0.8 --prompts FILE --output-dir DIR\n```",
    "journal": "The seeds and scalars of every step. They rebuild the tuned scales of any step "
    "over the base model:\n\n"
    "```\nqzo-diffuse replay --journal journal.qzo --output-dir DIR\n```",
    "native": "A diffusers transformer in the quantizer's own layout; load it with "
    f"`SD3Transformer2DModel.from_pretrained`. {NEEDS_GPU}",
}

USE_OF_LAYOUT = {
    "diffusers": f"`{DIFFUSERS_FILE}` with `config.json` is a diffusers transformer in bfloat16.",
    "original": f"`{ORIGINAL_FILE}` is the transformer in bfloat16 in the layout that\nStability "
    "AI publishes, which ComfyUI (`models/diffusion_models/`) and sd-scripts read.",
}
