"""Compare several runs in one table of text for a terminal, with the figures of their evaluations
side by side.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qzo_diffusion.core.errors import OutputError
from qzo_diffusion.system import escape


def check(file: Path, evaluation: Any) -> None:
    """Check that a file holds figures of a run on images.

    Raises:
        OutputError: it holds figures of pictures, of a language model, or something else.
    """
    one = {file.name: evaluation}
    try:
        table(rows(one))
        warnings(one)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        reason = f"no {error} in it" if isinstance(error, KeyError) else error
        raise OutputError(
            f"{file} can't be compared: {reason}",
            "the evaluation.json that `evaluate --run` writes for a run on images",
            "give runs on images that were evaluated, or their evaluation.json",
        ) from None


def rows(evaluations: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the figures to compare, one row for each run by name."""
    found = []
    for name, one in evaluations.items():
        similarity, clip, loss = (
            one["style"]["similarity"],
            one["clip_score"],
            one["validation_loss"] or {},
        )
        found.append(
            {
                "run": name,
                "step": one["step"],
                "scorer": one["scorer"]["name"],
                "style": similarity["mean"],
                "style_delta": similarity["delta"],
                "style_ci95": similarity["delta_ci95"],
                "clip": clip["mean"],
                "clip_delta": clip["delta"],
                "clip_ci95": clip["delta_ci95"],
                "kid": one["style"]["kid"]["value"],
                "held_out_loss": loss.get("tuned"),
                "held_out_delta": loss.get("delta"),
                "diversity": one["style"]["diversity"]["tuned"],
            }
        )
    return found


def warnings(evaluations: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the reasons why some figures of these runs must not be compared."""
    found = []
    if len({one["scorer"]["name"] for one in evaluations.values()}) > 1:
        found.append(
            "these runs were scored by different scorers: their scores can't be compared; use "
            "--scorer for all"
        )
    if len({tuple(row["prompt"] for row in one["prompts"]) for one in evaluations.values()}) > 1:
        found.append("these runs were scored on different prompts")
    if len({str(sorted(one["sampling"].items())) for one in evaluations.values()}) > 1:
        found.append("these runs were sampled with other seeds, steps or guidance")
    return found


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as text, with columns aligned for a terminal."""
    header = [
        "run",
        "step",
        "style",
        "change (95 %)",
        "content",
        "change (95 %)",
        "KID",
        "held-out loss",
        "diversity",
    ]
    lines = [header]
    for row in found:
        lines.append(
            [
                escape.one_line(row["run"]),
                str(row["step"]),
                _number(row["style"]),
                _change(row["style_delta"], row["style_ci95"]),
                _number(row["clip"]),
                _change(row["clip_delta"], row["clip_ci95"]),
                _number(row["kid"]),
                _number(row["held_out_loss"]),
                _number(row["diversity"]),
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _change(delta: float | None, interval: Sequence[float] | None) -> str:
    if delta is None:
        return "-"
    return f"{delta:+.4f}" + (f" ({interval[0]:+.4f} to {interval[1]:+.4f})" if interval else "")
