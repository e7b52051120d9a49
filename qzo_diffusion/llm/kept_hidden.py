"""Store the output of the untrained first blocks for each training text in a file, until the text
is drawn again.

Memory would have to hold more than a step itself: 35 MB for 1,000 sentences of SmolLM2, 2 GB for as
many long prompts of an 8B model. The file has no name, so it is deleted whenever the process ends.
"""

import io
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qzo_diffusion.core.errors import OutputError
from qzo_diffusion.llm.causal_lm import CausalLm, padded
from qzo_diffusion.system.files import free_bytes

Rows = Sequence[tuple[int, ...]]
SPARE = 2.0  # times the file's size must be free, else nothing is kept
# widths of forward passes are multiples of it: a CPU's 16-bit products keep 3 MB for every width
WIDTHS = 32


class KeptHidden:
    """Hidden states [T, D] by row of tokens.

    The last bits of a row's states depend on the other rows of its forward pass. So each row is
    always computed with the first group that holds it: a resumed run with an empty file gets the
    bits that it would have read.

    Args:
        lm: a model with a prefix.
        groups: all rows, in the groups that are computed together.
        folder: the folder of the file.

    Raises:
        OutputError: the disk is full.
    """

    def __init__(self, lm: CausalLm, groups: Sequence[Rows], folder: Path) -> None:
        self._lm, self._groups = lm, groups
        # A text may be in several groups. The first of them counts, in any order of requests.
        self._group_of: dict[tuple[int, ...], int] = {}
        for index, rows in enumerate(groups):
            for row in rows:
                self._group_of.setdefault(row, index)
        self._place: dict[tuple[int, ...], int] = {}
        self._dtype, self._width = torch.float32, 0  # known after the first forward pass
        folder.mkdir(parents=True, exist_ok=True)
        # Unbuffered: a failed write would raise once more when the file is closed.
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        weakref.finalize(self, self._file.close)

    def of(self, rows: Rows) -> Tensor:
        """Return [R, longest, D], with zeros after the end of a row, which nothing reads."""
        for row in rows:
            if row not in self._place:
                self._add(self._group_of[row])
        hidden = torch.zeros(len(rows), max(map(len, rows)), self._width, dtype=self._dtype)
        for states, row in zip(hidden, rows, strict=True):
            # the states of a row's tokens are one run of bytes
            self._read(self._place[row], states[: len(row)])
        return hidden.to(self._lm.device)

    def _add(self, group: int) -> None:
        """Compute a group, and keep those of its rows that belong to it."""
        assert self._lm.prefix is not None
        rows = self._groups[group]
        width = min(-(-max(map(len, rows)) // WIDTHS) * WIDTHS, self._lm.context)
        hidden = self._lm.prefix.before(
            padded(rows, self._lm.padding, width=width).to(self._lm.device)
        ).cpu()
        self._dtype, self._width = hidden.dtype, hidden.shape[-1]
        try:
            for row, states in zip(rows, hidden, strict=True):
                if self._group_of[row] == group and row not in self._place:
                    place = self._file.seek(0, io.SEEK_END)
                    self._write(
                        memoryview(
                            states[: len(row)].contiguous().view(torch.uint8).numpy().ravel()
                        )
                    )
                    self._place[row] = place
        except OSError as error:
            raise OutputError(
                f"the output of the first blocks can't be kept: {error.strerror or error}",
                "room in the cache folder",
                "free space, or set data.keep_hidden=false, then --resume the run; every step "
                "before this one is safe",
            ) from error

    def _write(self, rest: memoryview) -> None:
        while rest:
            rest = rest[self._file.write(rest) :]

    def _read(self, place: int, into: Tensor) -> None:
        rest = into.view(torch.uint8).numpy().ravel().data
        self._file.seek(place)
        while rest:  # one read may return less than it was asked for
            count = self._file.readinto(rest)
            if not count:
                raise _lost()
            rest = rest[count:]


def _lost() -> OutputError:
    return OutputError(
        "the file of kept hidden states is shorter than it was written",
        "a file that nobody else changes",
        "--resume the run, with data.keep_hidden=false if it happens again; every step before "
        "this one is safe",
    )


def fits(rows: Rows, bytes_of_token: int, folder: Path) -> bool:
    """Return whether the file system of `folder` has room."""
    return SPARE * sum(map(len, rows)) * bytes_of_token < free_bytes(folder)
