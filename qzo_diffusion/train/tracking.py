"""What a run tells while it goes on: metrics.jsonl, TensorBoard, and a progress bar on stderr."""

import json
import math
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qzo_diffusion.train.loop import StepRecord

TREND = 0.95  # weight of the past in the loss shown on the bar; single steps are too noisy to read


class MetricsLog:
    """metrics.jsonl: one JSON object a line, appended and flushed at once."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(_strict(entry), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Tracker:
    """Hands each step and validation to the log, the curves and the bar.

    Args:
        run: the run's folder.
        total_steps: of the whole run; first_step of this process.
        show_progress: False hides the bar.
    """

    def __init__(self, run: Path, total_steps: int, first_step: int = 0, show_progress: bool = True) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._log = MetricsLog(run / "metrics.jsonl")
        self._curves = SummaryWriter(str(run / "tensorboard"))
        self._bar = tqdm(
            total=total_steps, initial=first_step, desc="train", unit="step", disable=not show_progress, dynamic_ncols=True
        )
        self._trend: float | None = None
        self._probes = 0
        self._clipped = 0.0
        self._skipped = 0

    def on_step(self, record: StepRecord) -> None:
        self._log.write(record.as_dict())
        self._skipped += record.skipped
        self._probes += 1
        self._clipped += float(record.clipped)
        if not record.skipped:
            self._trend = record.loss if self._trend is None else TREND * self._trend + (1 - TREND) * record.loss
            self._curves.add_scalar("train/loss", record.loss, record.step)
            self._curves.add_scalar("train/lr", record.lr, record.step)
            self._curves.add_scalar("train/directional_derivative", _first(record.directional_derivative), record.step)
        self._bar.update(1)
        self._bar.set_postfix_str(self._summary(), refresh=False)

    def on_validation(self, step: int, loss: float) -> None:
        self._log.write({"step": step, "validation_loss": loss})
        self._curves.add_scalar("validation/loss", loss, step)
        self.say(f"step {step}: held-out loss {loss:.4f}")

    def say(self, text: str) -> None:
        """A line above the bar."""
        if not self._bar.disable:
            self._bar.write(text, file=self._bar.fp)

    def close(self) -> None:
        self._bar.close()
        self._curves.close()
        self._log.close()

    def _summary(self) -> str:
        parts = [f"loss {self._trend:.4f}" if self._trend is not None else "loss -"]
        parts.append(f"clipped {self._clipped / self._probes:.0%}")
        if self._skipped:
            parts.append(f"skipped {self._skipped}")
        return ", ".join(parts)


def _first(value: float | list[float]) -> float:
    return value[0] if isinstance(value, list) else value


def _strict(value: Any) -> Any:
    """NaN and infinities as text: JSON has no numbers for them, and a skipped step must not lose what it saw."""
    if isinstance(value, dict):
        return {key: _strict(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_strict(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
