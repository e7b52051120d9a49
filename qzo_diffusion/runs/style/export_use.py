"""How to load each format of an export, for its card, in Markdown."""

from collections.abc import Sequence
from typing import Literal

from qzo_diffusion.diffusion.families.family import Family

Format = Literal["nf4", "bf16", "lora", "delta", "journal", "native", "gguf"]
Layout = Literal["diffusers", "original", "both"]
DIFFUSERS_FILE, ORIGINAL_FILE = "diffusion_pytorch_model.safetensors", "original_layout.safetensors"

NEEDS_GPU = (
    'diffusers loads 4-bit folders on a GPU only; elsewhere it stops with "No GPU found". Without '
    "one, take an export in bf16, or sample with qzo-diffuse."
)
USE: dict[Format, str] = {
    "nf4": "A diffusers PART in bitsandbytes' 4-bit layout, the size of the 4-bit base:\n\n"
    '```python\nPART = CLASS.from_pretrained("this folder", dtype=torch.bfloat16)\n```\n\n'
    "Give it to `PIPELINE.from_pretrained(base, PART=PART)`. "
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
    "native": "A diffusers PART in the quantizer's own layout; load it with "
    f"`CLASS.from_pretrained`. {NEEDS_GPU}",
    "gguf": "A GGUF file in the layout that ComfyUI reads. Put it into ComfyUI's `models/unet/`, "
    "and load it with the node *Unet Loader (GGUF)* of ComfyUI-GGUF. In diffusers:\n\n"
    "```python\nPART = CLASS.from_single_file(\n"
    '    "FILE.gguf", config="folder of the base model", subfolder="PART", '
    "torch_dtype=torch.bfloat16,\n"
    "    quantization_config=GGUFQuantizationConfig(compute_dtype=torch.bfloat16),\n)\n```",
}

USE_OF_LAYOUT = {
    "diffusers": f"`{DIFFUSERS_FILE}` with `config.json` is a diffusers PART in bfloat16.",
    "original": f"`{ORIGINAL_FILE}` is the transformer in bfloat16 in the layout that\nits "
    "authors publish, which ComfyUI (`models/diffusion_models/`) and sd-scripts read.",
}


def how_to_use(kind: Format, layouts: Sequence[str], family: Family | None) -> list[str]:
    """Return paragraphs in Markdown on how to load an export of a family's model."""
    texts = [USE_OF_LAYOUT[layout] for layout in layouts] if kind == "bf16" else [USE[kind]]
    if family is None:
        return texts
    names = {
        "CLASS": family.denoiser.class_name,
        "PIPELINE": family.sampling.pipelines[0],
        "PART": family.denoiser.part,
    }
    for word, name in names.items():
        texts = [text.replace(word, name) for text in texts]
    return texts
