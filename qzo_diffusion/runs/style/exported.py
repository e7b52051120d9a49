"""An export: the run that it is of, and the settings, samples and card beside its files."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qzo_diffusion import __version__
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.errors import OutputError
from qzo_diffusion.diffusion.families.family import Family
from qzo_diffusion.diffusion.model_card import Base, card
from qzo_diffusion.runs.locate import locate
from qzo_diffusion.runs.publish import base_id, published_config, published_model, published_text
from qzo_diffusion.runs.style.export_scores import scores_of
from qzo_diffusion.runs.style.export_use import Format, Layout, how_to_use
from qzo_diffusion.system.files import free_bytes


@dataclass(frozen=True)
class Export:
    """A run, its tuned model if the format needs one, and the metadata of every file."""

    run: Path
    config: Config
    kind: Format
    facts: dict[str, str]
    notes: Sequence[str] = ()
    layout: Layout = "diffusers"
    family: Family | None = None
    quantization: str = ""

    @property
    def title(self) -> str:
        return published_text(locate(self.run).run().name)

    @property
    def base(self) -> Base:
        model = self.config.model
        return Base(published_model(model), base_id(model))

    @property
    def layouts(self) -> Sequence[str]:
        return ("diffusers", "original") if self.layout == "both" else (self.layout,)

    @property
    def use(self) -> str:
        """How to load the files, in Markdown."""
        first = how_to_use(self.kind, self.layouts, self.family)
        return "\n\n".join([*first, *filter(None, self.notes)])

    def describe(self, folder: Path) -> None:
        """Write settings, samples and the model card beside the files."""
        (
            folder / "config.yaml" if self.kind in ("delta", "journal") else folder / "run.yaml"
        ).write_text(published_config(self.config), encoding="utf-8")
        pictures = []
        if (grid := locate(self.run).run() / "samples" / "grid.png").is_file():
            shutil.copyfile(grid, folder / "samples.png")
            pictures.append("samples.png")
        data, train, qzo = self.config.data, self.config.train, self.config.qzo
        settings = {
            "steps": self.facts.get("qzo.steps", train.max_steps),
            "images a step": data.batch_size,
            "trained numbers": qzo.parametrization,
            "rate": f"{train.lr}, {train.schedule}",
            "eps": qzo.eps,
            "quantization": self.quantization
            or f"{self.config.quant.type}, blocks of {self.config.quant.blocksize}",
            "made with": f"qzo_diffusion {__version__}",
        }
        settings |= {"trigger": data.trigger} if data.trigger else {}
        text = card(
            self.title,
            self.base,
            self.use,
            settings,
            scores_of(self.run, self.facts),
            pictures,
        )
        (folder / "README.md").write_text(text, encoding="utf-8")


def check_room(target: Path, size: int) -> None:
    """Raises OutputError where the disk has no room for `size` bytes."""
    free = free_bytes(target)
    if free < 1.02 * size:
        got = f"{free / 1e9:.1f} GB free for an export of {size / 1e9:.1f} GB"
        raise OutputError(
            got, "room for the export", "free some space, or choose another --output-dir"
        )
