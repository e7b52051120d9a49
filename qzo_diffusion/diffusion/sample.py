"""One usable image of a style folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

LARGE_CUT, LARGE_GROWTH = 1 / 3 + 1e-9, 2.0  # more than this is noted


@dataclass(frozen=True)
class Sample:
    """One usable image.

    id: posix path relative to the folder; images of a validation folder have "validation:" before
    it.
    sha256: hash of the bytes of the file; of a masked image, of its mask and of what that shows.
    width, height: size of the bucket in pixels.
    notes: conversions that `open_image` made.
    split: "train" or "validation".
    caption_place: the file of the caption, with its line in metadata.jsonl.
    mask: where its mask comes from: "alpha", "file", or "none".
    cut: the fraction of the image outside its bucket.
    enlarged: the factor by which the rest is enlarged.
    """

    id: str
    path: Path
    sha256: str
    caption: str
    caption_source: str
    width: int
    height: int
    notes: tuple[str, ...]
    split: str
    repeats: int
    caption_place: str = ""
    cut: float = 0.0
    enlarged: float = 1.0
    mask: Literal["alpha", "file", "none"] = "none"

    @property
    def notes_on_shape(self) -> tuple[str, ...]:
        """Return a note if the bucket cuts or enlarges the image much."""
        cut = f"{self.cut:.0%} of it cut off" if self.cut > LARGE_CUT else ""
        grown = f"enlarged {self.enlarged:.1f} times" if self.enlarged > LARGE_GROWTH else ""
        return tuple(note for note in (cut, grown) if note)
