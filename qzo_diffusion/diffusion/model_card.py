"""What an exported file says of itself: `modelspec.*` metadata (Stability AI's specification 1.0.0)
and a README that hubs show.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import yaml

# width, layers -> the name in the specification's list of architectures
ARCHITECTURES = {
    (2432, 38): "stable-diffusion-3-5-large",
    (1536, 24): "stable-diffusion-3-5-medium",
}
LICENCES = {
    "stable-diffusion-3": ("other", "stabilityai-ai-community", "https://stability.ai/license")
}
UNKNOWN_LICENCE = "that of the base model"


def architecture(config: Mapping[str, Any]) -> str:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return ARCHITECTURES.get((width, config["num_layers"]), "stable-diffusion-3")


def modelspec(
    config: Mapping[str, Any], title: str, base: str, side: int, *, original_layout: bool = False
) -> dict[str, str]:
    """Metadata of a safetensors file."""
    original = "https://github.com/Stability-AI/sd3.5"
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture(config),
        "modelspec.implementation": original
        if original_layout
        else "https://github.com/huggingface/diffusers",
        "modelspec.title": title,
        "modelspec.description": f"{base} in another style, tuned by zeroth-order optimization "
        "of its quantization scales",
        "modelspec.date": datetime.now(timezone.utc)
        .replace(microsecond=0, tzinfo=None)
        .isoformat(),
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.license": _licence(base)["license"] if _licence(base) else UNKNOWN_LICENCE,
        "modelspec.tags": "style",
    }


def card(
    title: str,
    base: str,
    use: str,
    settings: Mapping[str, Any],
    scores: Mapping[str, Any],
    pictures: Sequence[str],
) -> str:
    """README.md: YAML that hubs read, then text.

    Args:
        use: how to load what lies beside it, in Markdown.
        scores: name -> figure, or a mapping of figures; empty when nothing was measured.
        pictures: file names beside it.
    """
    head: dict[str, Any] = {
        "base_model": base,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
    } | _licence(base)
    head |= {"tags": ["qzo", "zeroth-order", "style"]}
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {title}",
        f"`{base}`, tuned on a folder of images by forward passes alone: the codes of its "
        "4-bit weights are those of\n"
        "the base, its quantization scales are tuned (QZO, arXiv 2505.13430).",
    ]
    parts += [f"![prompts by steps, at equal seeds]({picture})" for picture in pictures]
    parts += ["## Use", use, "## Scores", _table(scores) if scores else "None was measured."]
    parts += ["## Settings", _table(settings), "## Licence", _licence_text(base)]
    return "\n\n".join(parts) + "\n"


def _licence(base: str) -> dict[str, str]:
    for part, (kind, name, link) in LICENCES.items():
        if part in base:
            return {"license": kind, "license_name": name, "license_link": link}
    return {"license": "apache-2.0"} if base == "tiny" else {}


def _licence_text(base: str) -> str:
    found = _licence(base)
    if "license_link" in found:
        return (
            "A derivative of the base model, under its licence: "
            f"[{found['license_name']}]({found['license_link']})."
        )
    return f"The licence of the base model applies{': Apache-2.0' if found else ''}."


def _table(rows: Mapping[str, Any]) -> str:
    lines = ["| | |", "|---|---|"]
    for name, value in rows.items():
        shown = (
            ", ".join(f"{key} {one}" for key, one in value.items())
            if isinstance(value, Mapping)
            else value
        )
        lines.append(f"| {name} | {shown} |")
    return "\n".join(lines)
