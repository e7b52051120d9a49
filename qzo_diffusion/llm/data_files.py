"""Read rows of local data files: .tsv and .csv with or without a header, .jsonl, SQuAD's .json, and
the Hub's .parquet.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qzo_diffusion.core.errors import DataError
from qzo_diffusion.llm.task_file import as_text
from qzo_diffusion.system.reading import parse_json
from qzo_diffusion.system.texts import check_encodable


@dataclass(frozen=True)
class Row:
    """Values by field as text. A list gives its first value here, and all in `alternatives`."""

    values: dict[str, str]
    place: str
    alternatives: dict[str, tuple[str, ...]] = field(default_factory=dict)


def data_folder(name: str) -> Path:
    """Find the folder of a `--data-dir`: a folder, or ORG/NAME[/SUBFOLDER] of a dataset in the
    Hub's local cache.

    Raises:
        DataError: it is neither. Nothing is ever downloaded, so the message says how to do that.
    """
    parts = Path(name).parts
    if (
        not Path(name).is_dir()
        and len(parts) > 1
        and not Path(name).is_absolute()
        and ".." not in parts
    ):
        snapshot = _cached_dataset("/".join(parts[:2]))
        if snapshot is not None and snapshot.joinpath(*parts[2:]).is_dir():
            return snapshot.joinpath(*parts[2:])
    if not Path(name).is_dir():
        raise DataError(
            f"{name!r} is neither a folder nor a dataset in the local cache",
            "the folder of the task's data, or a dataset's id that was downloaded",
            "pass --data-dir DIR; for a dataset of the Hub `hf download ORG/NAME --repo-type "
            "dataset`, then "
            "--data-dir ORG/NAME/SUBFOLDER",
        )
    return Path(name)


def _cached_dataset(repo: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, repo_type="dataset", local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def _as_on_the_hub(name: str) -> str:
    """Return the Hub's name of a part: dev.tsv -> validation-00000-of-00001.parquet."""
    split = Path(name).stem.partition("-")[0]
    return (
        f"{({'dev': 'validation', 'val': 'validation'}).get(split, split)}-00000-of-00001.parquet"
    )


def find_data(folder: Path, names: Sequence[str]) -> Path:
    """Find the first of the files that exists, else the file that the Hub has for that part.

    Raises:
        DataError: none exists.
    """
    there = sorted(path.name for path in folder.iterdir())
    by_lower_case = {name.lower(): name for name in reversed(there)}
    for name in [*names, *map(_as_on_the_hub, names)]:
        for found in (name, by_lower_case.get(name.lower(), name)):  # DEV.TSV for dev.tsv
            if (folder / found).is_file():
                return folder / found
    held = _quoted_names(there[:10]) or "nothing"
    raise DataError(
        f"{folder} holds {held}",
        " or ".join(names),
        "give another --data-dir, or name the files: data.train_file=NAME data.test_file=NAME",
    )


def read_rows(path: Path, fields: Sequence[str], columns: Sequence[str]) -> list[Row]:
    """Read all rows of a file.

    Args:
        fields: names that every row must have.
        columns: names of the columns of a .tsv or .csv without a header.

    Raises:
        DataError: another kind of file, no row, or a row without a field; the message has the line.
    """
    readers = {".tsv": _tabs, ".csv": _commas, ".jsonl": _json_lines, ".json": _squad}
    suffix = path.suffix.lower()
    reader = readers.get(suffix)
    if suffix == ".parquet":
        rows = list(_parquet(path, fields))
    elif reader is None:
        raise DataError(
            f"{path.name}", f"a file ending in {', '.join(readers)} or .parquet", "convert the data"
        )
    else:
        rows = list(reader(path, _text(path), fields, columns))
    for row in rows:
        missing = [name for name in fields if name not in row.values]
        if missing:
            have = _quoted_names(row.values) or "nothing"
            raise DataError(
                f"{row.place} has {have}",
                f"a field {missing[0]!r}, which the task reads",
                "correct the data or the task",
            )
        for name in fields:
            for value in (row.values[name], *row.alternatives.get(name, ())):
                check_encodable(value, f"{row.place}, {name}")
    if not rows:
        raise DataError(f"{path} holds no example", "at least one", "give another file")
    return rows


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} can't be read: {error}", "text in UTF-8", "give another file"
        ) from None


def _parquet(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    """Read a parquet file. Classes are numbers there: `choices` of the task say "0", "1"."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table
    except ImportError:
        raise DataError(
            f"{path.name}, and no pyarrow is installed",
            "pyarrow",
            'pip install "qzo-diffusion[parquet]"',
        ) from None
    try:
        entries = read_table(path).to_pylist()
    except (ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{path} can't be read: {error}", "a parquet file", "download it again"
        ) from None
    for number, entry in enumerate(entries, start=1):
        yield _row(entry, f"{path}, row {number}", fields)


def _quoted_names(names: Iterable[str]) -> str:
    """Join names of columns, which may hold spaces and commas."""
    return ", ".join(map(repr, names))


def _tabs(path: Path, text: str, fields: Sequence[str], columns: Sequence[str]) -> Iterator[Row]:
    """Read tab-separated values as GLUE writes them: a quotation mark is text."""
    lines = enumerate(text.split("\n"), start=1)
    return _table(
        path, [(number, line.split("\t")) for number, line in lines if line], fields, columns
    )


def _commas(path: Path, text: str, fields: Sequence[str], columns: Sequence[str]) -> Iterator[Row]:
    return _table(path, list(_quoted(path, text)), fields, columns)


def _quoted(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield rows with the line where each begins: a quoted cell may hold line ends."""
    reader = csv.reader(io.StringIO(text, newline=""))
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            got = f"{path}, line {start}: {error}"
            raise DataError(
                got,
                "comma-separated values",
                "correct the line; a quotation mark may lack its second",
            ) from None
        if cells is None:
            return
        if cells:
            yield start, cells


def _table(
    path: Path, lines: list[tuple[int, list[str]]], fields: Sequence[str], columns: Sequence[str]
) -> Iterator[Row]:
    has_names = bool(lines) and set(fields) <= set(lines[0][1])
    names = lines[0][1] if has_names else list(columns)
    for number, cells in lines[has_names:]:
        if len(cells) != len(names):
            raise DataError(
                f"{path}, line {number}: {len(cells)} columns",
                f"{len(names)}: {_quoted_names(names)}"
                if names
                else f"a first line with the names {_quoted_names(fields)}",
                "correct the line, or `columns` of the task file",
            )
        yield Row(dict(zip(names, cells, strict=True)), f"{path}, line {number}")


def _json_lines(
    path: Path, text: str, fields: Sequence[str], columns: Sequence[str]
) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            yield _row(_object(line, place), place, fields)


def _squad(path: Path, text: str, fields: Sequence[str], columns: Sequence[str]) -> Iterator[Row]:
    """Yield a row for each question: title, context, question, answers.

    A plain list of objects is read as well.
    """
    content = _json(text, str(path))
    if isinstance(content, list):
        for number, entry in enumerate(content, start=1):
            place = f"{path}, entry {number}"
            yield _row(_checked(entry, place), place, fields)
        return
    try:
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    said = [answer["text"] for answer in question["answers"]]
                    facts = {
                        "title": article.get("title", ""),
                        "context": paragraph["context"],
                        "question": question["question"],
                    }
                    yield _row(
                        facts | {"answers": said}, f"{path}, question {question.get('id')}", fields
                    )
    except (KeyError, TypeError, AttributeError) as error:
        got = f"{path} without {error}" if isinstance(error, KeyError) else f"{path}: {error}"
        raise DataError(
            got, "SQuAD's data, paragraphs, qas, answers, or a list of objects", "convert the data"
        ) from None


def _row(entry: dict[str, Any], place: str, fields: Sequence[str] = ()) -> Row:
    """Make a row of a JSON object.

    A null is no value. In `datasets`, SQuAD's answers are {"text": [...], ...}; the row takes those
    under `text`.

    Raises:
        DataError: one of the `fields` is another object or an empty list. Values that the task does
            not read are dropped.
    """
    values: dict[str, str] = {}
    lists: dict[str, tuple[str, ...]] = {}
    for name, found in entry.items():
        value = (
            found["text"]
            if isinstance(found, dict) and isinstance(found.get("text"), list)
            else found
        )
        parts = [one for one in (value if isinstance(value, list) else [value]) if one is not None]
        if any(isinstance(one, (dict, list)) for one in parts):
            if name in fields:
                got = (
                    f"{place}: {name} holds "
                    f"{'an object' if isinstance(found, dict) else 'lists or objects'}"
                )
                raise DataError(
                    got,
                    'a value, a list of values, or {"text": a list of values}',
                    "convert the data",
                )
            continue
        if isinstance(value, list) and not parts and name in fields:
            raise DataError(
                f"{place}: {name} is empty", "at least one value", "leave the entry out"
            )
        if parts:
            values[name] = as_text(parts[0])
        if parts and isinstance(value, list):
            lists[name] = tuple(map(as_text, parts))
    return Row(values, place, lists)


def _object(text: str, place: str) -> dict[str, Any]:
    return _checked(_json(text, place), place)


def _checked(entry: Any, place: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise DataError(
            f"{place} holds a {type(entry).__name__}", "a JSON object", "correct the file"
        )
    return entry


def _json(text: str, place: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(f"{place} is not JSON: {error}", "JSON", "correct the file") from None
