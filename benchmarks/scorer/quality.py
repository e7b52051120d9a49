"""What the embedded scorer is worth: does it find the caption of a drawing in a style that it never
saw?

R@1: how often the right caption comes first among those of all drawings asked, and the right
drawing for a caption. Many concepts differ by little ("woman running", "person running"), so that
all 1,500 at once are harder than any use of the scorer."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import write_results
from benchmarks.scorer.drawings import HELD_OUT_STYLE, STYLES, Concepts, load_concepts
from benchmarks.scorer.train import HELD_OUT
from qzo_diffusion.evaluate.style import control_gap

AMONG, DRAWS = 200, 20
TRAINED, OTHERS = 40, 16  # as many pictures of a style as the demo has, and as many held out


def load_scorer(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer, by open_clip's own functions."""
    import open_clip

    model = open_clip.create_model(f"local-dir:{folder}")
    return model.eval(), open_clip.get_tokenizer(f"local-dir:{folder}")


@torch.no_grad()
def features(scorer: tuple[Any, Any], concepts: Concepts, style: int) -> tuple[Tensor, Tensor]:
    """Unit features [concepts, D] of the drawings in one style and of their names."""
    model, tokenizer = scorer
    images = concepts.images[style].float() / 127.5 - 1
    pictures = torch.cat([model.encode_image(part) for part in images.split(64)])
    texts = torch.cat([model.encode_text(part) for part in tokenizer(concepts.names).split(256)])
    return F.normalize(pictures, dim=1), F.normalize(texts, dim=1)


def recall(pictures: Tensor, texts: Tensor) -> tuple[float, float]:
    """R@1 from drawing to caption and from caption to drawing."""
    target = torch.arange(len(pictures))
    cosine = pictures @ texts.T
    return float((cosine.argmax(1) == target).float().mean()), float(
        (cosine.argmax(0) == target).float().mean()
    )


def recall_among(pictures: Tensor, texts: Tensor, seed: int = 0) -> dict[str, float | int]:
    """Mean R@1 among 200 drawn at random, over some draws; among all where there are no 200."""
    among, found = min(AMONG, len(pictures)), []
    for draw in range(DRAWS if among < len(pictures) else 1):
        rows = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed + draw))[
            :among
        ]
        found.append(recall(pictures[rows], texts[rows]))
    to_text, to_image = (sum(pair[side] for pair in found) / len(found) for side in (0, 1))
    worst = min(pair[0] for pair in found)
    return {
        "image_to_text": round(to_text, 4),
        "text_to_image": round(to_image, 4),
        "worst_draw": round(worst, 4),
        "among": among,
        "draws": len(found),
    }


def control_gaps(
    scorer: tuple[Any, Any], everything: Concepts, styles: list[str], rows: list[int]
) -> dict[str, Any]:
    """For each style: are its held-out drawings closer to the centroid of forty others of it than
    the other styles' drawings are?

    All sides show different concepts, so that only style can tell them apart.
    """
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    shown = [rows[index] for index in order if everything.usable[:, rows[index]].all()]
    found = {}
    for style, name in enumerate(styles):
        trained, held_out = (
            features(scorer, everything.part(shown[part]), style)[0]
            for part in (slice(TRAINED), slice(TRAINED, TRAINED + OTHERS))
        )
        others = []
        for index, other in enumerate(other for other in range(len(styles)) if other != style):
            start = TRAINED + OTHERS * (index + 1)
            others.append(
                features(scorer, everything.part(shown[start : start + OTHERS]), other)[0]
            )
        found[name] = control_gap(
            held_out, torch.cat(others), trained, "drawings of the other styles"
        )
    return found


def parts_of(folder: Path, names: list[str]) -> tuple[list[int], list[int]]:
    """Positions of the concepts that the scorer in `folder` learnt, and of those it did not.

    Raises:
        ValueError: the folder does not say, as those of the first recipe.
    """
    if not (folder / HELD_OUT).is_file():
        raise ValueError(
            f"{folder} holds no {HELD_OUT}, so it was trained by an earlier recipe; "
            "measure it with commit 2c28506"
        )
    held_out = set(json.loads((folder / HELD_OUT).read_text()))
    unseen = [index for index, name in enumerate(names) if name in held_out]
    return sorted(set(range(len(names))) - set(unseen)), unseen


def measure(data: Path, folder: Path) -> dict[str, Any]:
    scorer, styles = load_scorer(folder), [*STYLES, HELD_OUT_STYLE]
    everything = load_concepts(data, styles)
    known, unseen = parts_of(folder, everything.names)
    figures: dict[str, Any] = {}
    for style, name in enumerate(styles):
        for kind, rows in (("known", known), ("unseen", unseen)):
            there = [row for row in rows if everything.usable[style, row]]
            pictures, texts = features(scorer, everything.part(there), style)
            entry = recall_among(pictures, texts)
            if kind == "known":
                entry |= {"among_all": round(recall(pictures, texts)[0], 4), "all": len(there)}
            figures.setdefault(name, {})[f"{kind}_concepts"] = entry
    return {"recall_at_1": figures, "control_gap": control_gaps(scorer, everything, styles, known)}


def write_report(data: Path, folder: Path) -> None:
    figures = {
        "held_out_style": HELD_OUT_STYLE,
        **measure(data, folder),
        "parameters": sum(p.numel() for p in load_scorer(folder)[0].parameters()),
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
    }
    write_results("scorer_quality", figures)
    print(json.dumps(figures, indent=1))
