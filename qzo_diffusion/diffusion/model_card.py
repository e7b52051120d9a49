"""Describe an exported file: `modelspec.*` metadata (Stability AI's specification 1.0.0), and a
README for hubs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import yaml

from qzo_diffusion.system.escape import markdown, markdown_code, one_line

FLUX2_LICENCE = (
    "other",
    "flux-non-commercial-license",
    "https://huggingface.co/black-forest-labs/FLUX.2-klein-base-9B/blob/main/LICENSE.md",
)
LICENCES = {
    "stable-diffusion-3": ("other", "stabilityai-ai-community", "https://stability.ai/license"),
    "FLUX.1-dev": (
        "other",
        "flux-1-dev-non-commercial-license",
        "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
    ),
    "stable-diffusion-xl": (
        "openrail++",
        "openrail++",
        "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/blob/main/LICENSE.md",
    ),
    "stable-diffusion-2": (
        "openrail++",
        "openrail++",
        "https://huggingface.co/stabilityai/stable-diffusion-2/blob/main/LICENSE-MODEL",
    ),
    "stable-diffusion-v1-5": (
        "creativeml-openrail-m",
        "creativeml-openrail-m",
        "https://huggingface.co/spaces/CompVis/stable-diffusion-license",
    ),
    "FLUX.2-klein-9B": FLUX2_LICENCE,
    "FLUX.2-klein-base-9B": FLUX2_LICENCE,
}
APACHE = (
    "tiny",
    "FLUX.1-schnell",
    "FLUX.2-klein-4B",
    "FLUX.2-klein-base-4B",
    "Qwen-Image",
    "Qwen-Image-2512",
    "Z-Image",
    "Z-Image-Turbo",
)
DIFFUSERS = "https://github.com/huggingface/diffusers"
UNKNOWN_LICENCE = "that of the base model"


def modelspec(
    architecture: str, title: str, base: str, side: int, *, implementation: str = DIFFUSERS
) -> dict[str, str]:
    """Metadata of a safetensors file.

    Args:
        architecture: the name in the specification's list.
        side: of the pictures in pixels.
        implementation: the code whose layout the file has.
    """
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": implementation,
        "modelspec.title": one_line(title),
        "modelspec.description": f"{base} in another style, tuned by zeroth-order optimization "
        "of its quantization scales",
        "modelspec.date": datetime.now(timezone.utc)
        .replace(microsecond=0, tzinfo=None)
        .isoformat(),
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.license": _licence(base)["license"] if _licence(base) else UNKNOWN_LICENCE,
        "modelspec.tags": "style",
    }


@dataclass(frozen=True)
class Base:
    """The model that was tuned: its name, and its Hub id if it has one."""

    name: str
    hub_id: str | None = None


@dataclass(frozen=True)
class Scores:
    """The verdict in one sentence; rows of (name, base, tuned, change and interval) as text; a
    remark on the scorer.
    """

    rows: Sequence[Sequence[str]] = ()
    verdict: str = ""
    remark: str = ""


def card(
    title: str,
    base: Base,
    use: str,
    settings: Mapping[str, Any],
    scores: Scores,
    pictures: Sequence[str],
) -> str:
    """Return README.md: YAML for hubs, then text. Names and words from outside are escaped here.

    Args:
        use: Markdown on how to load the files beside it.
        pictures: file names beside it.
    """
    head: dict[str, Any] = {} if base.hub_id is None else {"base_model": base.hub_id}
    head |= {"library_name": "diffusers", "pipeline_tag": "text-to-image"} | _licence(base.name)
    head |= {"tags": ["qzo", "zeroth-order", "style"]}
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {markdown(title)}",
        f"{markdown_code(base.name)}, tuned on a folder of images by forward passes alone: the "
        "codes of its 4-bit weights are those of\n"
        "the base, its quantization scales are tuned (QZO, arXiv 2505.13430).",
    ]
    parts += [f"![prompts by steps, at equal seeds]({picture})" for picture in pictures]
    parts += ["## Use", use, "## Scores", *_scores(scores)]
    rows = [(markdown(name), markdown(str(value))) for name, value in settings.items()]
    parts += ["## Settings", _table(("Setting", "Value"), rows)]
    parts += ["## Licence", _licence_text(base.name)]
    return "\n\n".join(parts) + "\n"


def _scores(scores: Scores) -> list[str]:
    if not scores.rows:
        return ["None was measured."]
    rows = [tuple(map(markdown, row)) for row in scores.rows]
    table = _table(("Figure", "Base", "Tuned", "Change", "95 % interval"), rows)
    texts = [markdown(scores.verdict), markdown(scores.remark)]
    return [text for text in (texts[0], table, texts[1]) if text]


def _licence(base: str) -> dict[str, str]:
    for part, (kind, name, link) in LICENCES.items():
        if part in base:
            return {"license": kind, "license_name": name, "license_link": link}
    return {"license": "apache-2.0"} if base.rpartition("/")[2] in APACHE else {}


def _licence_text(base: str) -> str:
    found = _licence(base)
    if "license_link" in found:
        return (
            "A derivative of the base model, under its licence: "
            f"[{found['license_name']}]({found['license_link']})."
        )
    return f"The licence of the base model applies{': Apache-2.0' if found else ''}."


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of cells that are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
