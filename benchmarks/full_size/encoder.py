"""Stage encoder: a language model in bf16 on disk, read into NF4, and a prompt that it encodes."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.full_size.model import TEXT_TOKENS, Subject
from benchmarks.full_size.weights import need_disk, status, write_synthetic
from benchmarks.resident import reset_peak
from qzo_diffusion.diffusion.language_model import LanguageModel, language_states

OTHERS = 1e9  # bytes that reading may take beside the 4-bit model and a layer


class Ids:
    """In place of a tokenizer, whose words don't matter here."""

    def __call__(self, text: str, max_length: int, **options: Any) -> Any:
        ids = torch.arange(max_length)[None]
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))


def part_of(subject: Subject) -> tuple[str, LanguageModel]:
    """Return the part of a pipeline that is a language model."""
    classes = subject.family.texts.classes.items()
    return next((part, kind) for part, kind in classes if isinstance(kind, LanguageModel))


def config_of(subject: Subject, part: str) -> dict[str, Any]:
    own = subject.published.encoders[part]
    return {**own, "num_hidden_layers": min(own["num_hidden_layers"], subject.layers)}


def encoder(subject: Subject, folder: Path) -> dict[str, Any]:
    """Return peaks in GB: of the whole process, and the most that it may take."""
    from qzo_diffusion.diffusion import text_encoders
    from qzo_diffusion.quant.stored import pending_tensors
    from qzo_diffusion.quant.stream import Quantization

    part, kind = part_of(subject)
    config = config_of(subject, part)
    whole = text_encoders.empty_encoder(kind.class_name, config)
    count = sum(parameter.numel() for parameter in whole.parameters())
    if not (folder / part / "config.json").is_file():
        need_disk(folder, 2.1e-9 * count)
        write_synthetic(whole, folder / part, "model")
        (folder / part / "config.json").write_text(json.dumps(config))
    layer: Any = whole.layers[0]  # type: ignore[index]
    one_layer = sum(parameter.numel() for parameter in layer.parameters()) * 2
    reset_peak()
    imports, started = status("VmRSS"), time.perf_counter()
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": torch.device("cpu")}
    made: Any = text_encoders.load_text_encoder(
        folder, part, kind, quantization=Quantization(), **options
    )
    loaded, seconds = status("VmHWM"), time.perf_counter() - started
    in_4_bits = sum(tensor.nbytes for tensor in pending_tensors(made).values())
    (states,) = language_states(made, Ids(), ["a prompt"], TEXT_TOKENS)
    assert states.isfinite().all()
    peak = status("VmHWM")
    return {
        "encoder_parameters": count,
        "encoder_in_4_bits_gb": round(in_4_bits / 1e9, 3),
        "encoder_one_layer_gb": round(one_layer / 1e9, 3),
        "encoder_imports_gb": round(imports, 3),
        "encoder_load_peak_rss_gb": round(loaded, 3),
        "encoder_peak_rss_gb": round(peak, 3),
        "encoder_peak_allowed_gb": round((in_4_bits + one_layer + OTHERS) / 1e9, 3),
        "encoder_load_seconds": round(seconds, 1),
    }
