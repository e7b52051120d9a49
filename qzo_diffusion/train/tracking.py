"""Report a run while it goes on: metrics.jsonl, TensorBoard, and a progress bar on stderr.

Nothing here writes from a thread, as TensorBoard's own writer does: a full disk must raise where
the run can handle it, and not in the traceback of a thread."""

import contextlib
import io
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzo_diffusion.core.errors import OutputError
from qzo_diffusion.system.console import is_shown
from qzo_diffusion.system.progress import Progress
from qzo_diffusion.train.loop import StepRecord

if TYPE_CHECKING:
    from PIL.Image import Image

TREND = 0.95  # weight of the past in the loss shown on the bar; single steps are too noisy to read


class MetricsLog:
    """metrics.jsonl: one JSON object a line, in the operating system's hands when `write` returns.

    Raises:
        OutputError: no room or no permission. The file then ends with the last whole line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise self._unwritable(error) from error

    def write(self, entry: dict[str, Any]) -> None:
        line = json.dumps(_strict(entry), allow_nan=False).encode() + b"\n"
        start = self._file.tell()
        try:
            _write_all(self._file, line)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(start)
            raise self._unwritable(error) from error

    def close(self) -> None:
        self._file.close()

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(
            f"{self._path} can't be written: {error.strerror or error}",
            "a place with room for the run",
            "free space or correct the permissions, then --resume the run; every step before "
            "this one is safe",
        )


def _write_all(file: io.FileIO, data: bytes) -> None:
    """All of it: one write to an unbuffered file may take less than it is given."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


class _Whole:
    """An unbuffered file as TensorBoard's writer needs it: each write takes all of its bytes."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file

    def write(self, data: bytes) -> None:
        _write_all(self._file, data)


class Curves:
    """Write scalars for TensorBoard. A run does not need them: `problem` says why they stopped."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        self.problem: str | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # without the machine's name, which TensorBoard's own writer puts here
            name = f"events.out.tfevents.{time.time():.6f}.run.{os.getpid()}"
            self._file = (folder / name).open("wb", buffering=0)
        except OSError as error:
            self.problem = str(error)
            return
        self._records = RecordWriter(_Whole(self._file))
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add(self, tag: str, value: float, step: int) -> None:
        summary = self._summary(value=[self._summary.Value(tag=tag, simple_value=value)])
        self._write(self._event(wall_time=time.time(), step=step, summary=summary))

    def add_picture(self, tag: str, picture: "Image", step: int) -> None:
        """A picture as PNG."""
        buffer = io.BytesIO()
        picture.convert("RGB").save(buffer, format="PNG")
        shown = self._summary.Image(
            height=picture.height,
            width=picture.width,
            colorspace=3,
            encoded_image_string=buffer.getvalue(),
        )
        summary = self._summary(value=[self._summary.Value(tag=tag, image=shown)])
        self._write(self._event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        if self.problem is None:
            self._file.close()

    def _write(self, event: Any) -> None:
        if self.problem is not None:
            return
        try:
            self._records.write(event.SerializeToString())
        except OSError as error:
            self.problem = str(error)
            self._file.close()


class Tracker:
    """Write each step and validation to the log, the curves and the bar.

    Args:
        run: the run's folder.
        total_steps: of the whole run; first_step of this process.
        show_progress: False hides the bar and all messages.
    """

    def __init__(
        self, run: Path, total_steps: int, first_step: int = 0, show_progress: bool = True
    ) -> None:
        self._log = MetricsLog(run / "metrics.jsonl")
        self._curves = Curves(run / "tensorboard")
        self._show = show_progress
        self._bar = Progress(
            total=total_steps,
            initial=first_step,
            desc="train",
            unit="step",
            disable=not show_progress,
            dynamic_ncols=True,
        )
        self._trend: float | None = None
        self._probes = 0
        self._clipped = 0.0
        self._skipped = 0
        self._warned = False

    def on_step(self, record: StepRecord) -> None:
        self._log.write(record.as_dict())
        self._skipped += record.skipped
        self._probes += 1
        self._clipped += float(record.clipped)
        if not record.skipped:
            self._trend = (
                record.loss
                if self._trend is None
                else TREND * self._trend + (1 - TREND) * record.loss
            )
            self._curves.add("train/loss", record.loss, record.step)
            self._curves.add("train/lr", record.lr, record.step)
            derivative = record.directional_derivative
            self._curves.add("train/directional_derivative", derivative, record.step)
        if self._curves.problem and not self._warned:
            self._warned = True
            self.report(f"warning: no more curves for TensorBoard: {self._curves.problem}")
        self._bar.update(1)
        self._bar.set_postfix_str(self._summary(), refresh=False)

    def on_validation(self, step: int, loss: float) -> None:
        self._log.write({"step": step, "validation_loss": loss})
        self._curves.add("validation/loss", loss, step)
        self.report(f"step {step}: held-out loss {loss:.4f}")

    def on_final(self, step: int, final_step: int) -> None:
        """Record the step whose scales are the result of the run, after the last step."""
        self._log.write({"step": step, "final_step": final_step})

    def on_pictures(self, step: int, column: "Image") -> None:
        """The grid of a step: TensorBoard shows it with a slider over steps."""
        self._curves.add_picture("samples", column, step)

    def report(self, text: str) -> None:
        """A line above the bar."""
        if self._show and is_shown(text):
            self._bar.write(text, file=sys.stderr)

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


def _strict(value: Any) -> Any:
    """NaN and infinities as text, which strict JSON has no numbers for."""
    if isinstance(value, dict):
        return {key: _strict(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_strict(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
