"""Export a run's journal without the places of its machine."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from qzo_diffusion.config.style import Config
from qzo_diffusion.core.errors import OutputError
from qzo_diffusion.core.journal import Journal, encoded, read_journal
from qzo_diffusion.core.journal_format import NoteEntry
from qzo_diffusion.runs.locate import locate
from qzo_diffusion.runs.publish import published
from qzo_diffusion.runs.style.exported import Export
from qzo_diffusion.system.files import write_folder, write_whole

JOURNAL = "journal.qzo"


def export_journal(run_folder: Path, config: Config, target: Path) -> dict[str, Any]:
    """Copy the journal up to its last whole step, which was checked on reading.

    If its header or a note names a local path, it is rewritten without, in a new chain.
    """
    source = locate(run_folder).run() / JOURNAL
    journal = read_journal(source)
    data = _published_journal(source, journal)
    export = Export(run_folder, config, "journal", {"qzo.steps": str(journal.steps_done)})

    def fill(folder: Path) -> None:
        write_whole(folder / JOURNAL, data)
        if read_journal(folder / JOURNAL).steps_done != journal.steps_done:
            raise OutputError(
                f"{folder / JOURNAL} is not what was copied",
                "the same journal",
                "stop the run first, or try again",
            )
        export.describe(folder)

    write_folder(target, fill)
    size = (target / JOURNAL).stat().st_size
    return {"export": str(target), "format": "journal", "bytes": size, "steps": journal.steps_done}


def _published_journal(source: Path, journal: Journal) -> bytes:
    header = published(journal.header)
    notes = {
        index: replace(entry, content=published(entry.content))
        for index, entry in enumerate(journal.entries)
        if isinstance(entry, NoteEntry)
    }
    if header == journal.header and all(journal.entries[at] == one for at, one in notes.items()):
        return source.read_bytes()[: journal.size]
    return encoded(header, (notes.get(at, one) for at, one in enumerate(journal.entries)))
