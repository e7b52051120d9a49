"""Says which kind of file or model something is that can't be used, and which step helps.

Everything here looks at names and at the first bytes; nothing is loaded and nothing raises."""

import contextlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SAFETENSORS = "get the same weights as safetensors; pickles can run code and are not read"
KNOWN_FILE = "give a denoiser of a family that docs/models.md lists"
LOOKED_AT = 2**16  # bytes


@dataclass(frozen=True)
class Kind:
    """`name` completes "it is ..."; `remedy` is an imperative."""

    name: str
    remedy: str


# First bytes of a file -> its kind.
MAGIC: tuple[tuple[bytes, Kind], ...] = (
    (
        b"version https://git-lfs",
        Kind(
            "a Git LFS pointer, not the file that it stands for",
            "fetch the file: `git lfs pull` in its repository, or hf download",
        ),
    ),
    (b"\x80\x02", Kind("a pickle, such as .ckpt, .pt and .bin files are", SAFETENSORS)),
    (b"\x80\x04", Kind("a pickle, such as .ckpt, .pt and .bin files are", SAFETENSORS)),
    (b"\x89HDF", Kind("an HDF5 file of Keras or TensorFlow", "get the weights as safetensors")),
    (b"\x1f\x8b", Kind("a gzip archive", "unpack it and give the file or folder inside")),
    (b"7z\xbc\xaf", Kind("a 7z archive", "unpack it and give the file or folder inside")),
    (b"\x89PNG", Kind("a PNG picture", "give a file of weights")),
    (b"\xff\xd8\xff", Kind("a JPEG picture", "give a file of weights")),
    (b"<!DOCTYPE", Kind("a web page, not a file of weights", "download the file itself")),
    (b"<!doctype", Kind("a web page, not a file of weights", "download the file itself")),
    (b"<html", Kind("a web page, not a file of weights", "download the file itself")),
)
ONNX = Kind("an ONNX graph", "get the weights as safetensors; graphs are not trained")

# A part of a tensor's name -> the kind of its file; the first that is found counts.
_LORA = Kind(
    "a LoRA, which is small matrices beside a model's weights",
    "give the whole model; a LoRA must be merged into its base first",
)
_FOLDER = (
    "make a diffusers folder of it: `from_single_file` of diffusers' pipeline, then "
    "`save_pretrained`; and give --model that folder"
)
_ANOTHER = "use a model of a known family; " + KNOWN_FILE
TENSORS: tuple[tuple[str, Kind], ...] = (
    (r"lora_(down|up|A|B)\b|\.lora\.|lora_(unet|te\d?)_|hada_w1|lokr_w|oft_blocks", _LORA),
    (r"controlnet_|control_model\.", Kind("a ControlNet", _ANOTHER)),
    (r"^image_proj|^ip_adapter", Kind("an IP-Adapter", _ANOTHER)),
    (r"double_stream_blocks\.", Kind("a transformer of HiDream", _ANOTHER)),
    (r"double_layers\.|joint_transformer_blocks\.", Kind("a transformer of AuraFlow", _ANOTHER)),
    (r"noise_refiner\.", Kind("a transformer of Lumina", _ANOTHER)),
    (r"adaln_single\.|\bcaption_projection\.", Kind("a transformer of PixArt or Sana", _ANOTHER)),
    (
        r"blocks\.\d+\.(cross_attn|self_attn)\.norm_q",
        Kind("a transformer of Wan, a video model", _ANOTHER),
    ),
    (r"conditioner\.embedders\.", Kind("a checkpoint of Stable Diffusion XL", _FOLDER)),
    (r"cond_stage_model\.", Kind("a checkpoint of Stable Diffusion 1 or 2", _FOLDER)),
    (
        r"input_blocks\.|down_blocks\.\d+\.(attentions|resnets)\.\d+\.(transformer_blocks|time_emb)",
        Kind("a U-Net, as Stable Diffusion 1, 2 and XL have", _FOLDER),
    ),
    (
        r"(encoder\.)?block\.\d+\.layer\.\d+\.SelfAttention",
        Kind("a T5 text encoder alone", KNOWN_FILE),
    ),
    (
        r"text_model\.encoder\.layers\.|transformer\.resblocks\.",
        Kind("a CLIP text encoder alone", KNOWN_FILE),
    ),
    (r"decoder\.(up_blocks|up|mid)\b|first_stage_model\.", Kind("a VAE alone", KNOWN_FILE)),
    (
        r"layers\.\d+\.self_attn\.q_proj|\bh\.\d+\.attn\.c_attn|layers\.\d+\.attention\.query_key",
        Kind("a language model", "give it to `qzo-diffuse llm`; " + KNOWN_FILE),
    ),
    (r"^(clip_l|clip_g|emb_params)$", Kind("a textual inversion embedding", KNOWN_FILE)),
)

WITHOUT_CONFIG = Kind(
    "a transformer in the names of diffusers without its config.json",
    "put the config.json of its model beside it",
)

# Words in the name of a model on the Hub -> its family.
FAMILIES: tuple[tuple[str, str], ...] = (
    (r"flux", "FLUX"),
    (r"sdxl|stable-diffusion-xl|playground-v2|\bpony|illustrious", "Stable Diffusion XL"),
    (r"stable-diffusion-(v?1|v?2)|\bsd-?(v?1|v?2|turbo)\b|dreamshaper", "Stable Diffusion 1 or 2"),
    (r"stable-cascade|wuerstchen", "Stable Cascade"),
    (r"qwen[-_]?image", "Qwen-Image"),
    (r"z-image", "Z-Image"),
    (r"lumina", "Lumina"),
    (r"\bwan\d|wan-ai", "Wan, a video model,"),
    (r"hunyuan", "Hunyuan"),
    (r"pixart|\bsana", "PixArt or Sana"),
    (r"hidream", "HiDream"),
    (r"auraflow", "AuraFlow"),
    (r"chroma", "Chroma"),
    (r"kolors", "Kolors"),
    (r"ltx-?video|cogvideo|mochi", "video models"),
    (r"kandinsky", "Kandinsky"),
)
GGUF_OF_PICTURES = {"sd1", "sd2", "sd3", "sdxl", "aura", "ltxv", "hyvid", "cosmos", "wan"}
LANGUAGE = r"llama|smollm|qwen\d|mistral|gemma|\bphi-|gpt|opt-\d|pythia|olmo|deepseek|falcon"


def described(file: Path) -> Kind | None:
    """The kind of a file by its first bytes, None where they say nothing."""
    with contextlib.suppress(OSError):
        with file.open("rb") as handle:
            start = handle.read(LOOKED_AT)
        if start.startswith(b"GGUF"):
            return _gguf(start)
        for magic, kind in MAGIC:
            if start.startswith(magic):
                return kind
        if start.startswith(b"PK"):
            return _archive(start)
        # a graph's version and producer; a safetensors file has zeros in bytes 5 to 8
        of_onnx = start[:1] == b"\x08" and start[2:3] == b"\x12" and any(start[4:8])
        if of_onnx or file.suffix.lower() == ".onnx":
            return ONNX
        if len(start) > 64 and not any(start):
            return Kind("zeros alone, as an interrupted download leaves them", "download it again")
    return None


def described_tensors(names: Iterable[str]) -> Kind | None:
    """The kind of a file of weights by the names of its tensors."""
    text = list(names)
    for pattern, kind in TENSORS:
        if any(re.search(pattern, name) for name in text):
            return kind
    return None


def family_of(name: str) -> str | None:
    """The family of pictures that a Hub id says it is of, None for a supported or unknown one."""
    lower = name.lower()
    if re.search(r"stable-diffusion-3|\bsd3", lower):
        return None
    return next((family for pattern, family in FAMILIES if re.search(pattern, lower)), None)


def is_language_model(name: str) -> bool:
    """Return whether a Hub id names a language model."""
    return family_of(name) is None and re.search(LANGUAGE, name.lower()) is not None


def family_of_class(pipeline: str) -> str:
    """The family in words that a class of a pipeline or a transformer is for."""
    return re.sub(
        r"(Pipeline|Transformer2DModel|Transformer3DModel|Model|Img2Img|Inpaint)", "", pipeline
    )


def gguf_of_pictures(architecture: str) -> bool:
    """Return whether an architecture that a GGUF file states is one of pictures or video."""
    return architecture in GGUF_OF_PICTURES or family_of(architecture) is not None


def _gguf(start: bytes) -> Kind:
    """Describe a GGUF file by the architecture at its beginning."""
    found = re.search(rb"general\.architecture\x08\0\0\0(.{8})", start, re.DOTALL)
    end = found.end() + min(64, int.from_bytes(found[1], "little")) if found else 0
    name = start[found.end() : end].decode("ascii", "replace") if found else ""
    if gguf_of_pictures(name):
        return Kind(
            f"a GGUF file of a diffusion model ({name})",
            "give it to `qzo-diffuse train --transformer FILE.gguf` beside a pipeline's --model",
        )
    return Kind(
        f"a GGUF file{f' of a language model ({name})' if name else ''}",
        "give a safetensors file; language models in GGUF go to `qzo-diffuse llm`",
    )


def _archive(start: bytes) -> Kind:
    if b"data.pkl" in start:
        return Kind("a pickle, such as .ckpt, .pt and .bin files are", SAFETENSORS)
    return Kind("a zip archive", "unpack it and give the file or folder inside")
