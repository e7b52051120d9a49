"""Split the examples of a task's files for training, validation and tests."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qzo_diffusion.config.llm import LlmConfig, LlmDataConfig
from qzo_diffusion.core.errors import ConfigError, DataError
from qzo_diffusion.llm.data_files import Row, data_folder, find_data, read_rows
from qzo_diffusion.llm.task_file import TaskSpec
from qzo_diffusion.llm.tasks import Example, choose_rows, make_examples
from qzo_diffusion.system.console import report

HELD_OUT = 5  # each part besides training gets at most one row of five in a file that is too small
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Splits:
    train: list[Example]
    validation: list[Example]
    test: list[Example]

    def longest(self) -> int:
        """The number of characters of the longest text of any part."""
        texts = (
            len(example.prompt) + max(map(len, example.continuations), default=0)
            for example in (*self.train, *self.validation, *self.test)
        )
        return max(texts, default=0)

    def all(self) -> list[Example]:
        return self.train + self.validation + self.test


def read_splits(config: LlmConfig, spec: TaskSpec, needed: Sequence[str]) -> Splits:
    """Choose disjoint random parts, the same for every seed of a run.

    The test examples are chosen first if one file holds all parts.

    Raises:
        DataError: a file is missing or wrong, or a needed part is empty.
    """
    data = config.data
    if data.dir is None:
        raise ConfigError(
            "no folder of data",
            "the folder of the task's files",
            "pass --data-dir DIR or set data.dir",
        )
    folder = data_folder(data.dir)
    train_path = find_data(folder, [data.train_file] if data.train_file else spec.train)
    test_path = find_data(folder, [data.test_file] if data.test_file else spec.test)

    def rows(path: Path) -> list[Row]:
        return read_rows(path, spec.fields, spec.columns)

    own = rows(train_path)
    if train_path.samefile(test_path):
        # both by the file's real name, in any spelling: the random choice depends on it
        asked = [data.test_examples, data.train_examples, data.validation_examples]
        wanted = fitting(len(own), asked, train=1)
        test, train, validation = choose_rows(
            own, wanted, data.split_seed, train_path.resolve().name
        )
    else:
        wanted = fitting(len(own), [data.train_examples, data.validation_examples], train=0)
        train, validation = choose_rows(own, wanted, data.split_seed, train_path.name)
        (test,) = choose_rows(
            rows(test_path), [data.test_examples], data.split_seed, test_path.name
        )
    _report_fewer(data, train=len(train), validation=len(validation))
    components = (
        ("train", train, 1),
        ("validation", validation, data.validation_examples),
        ("test", test, data.test_examples),
    )
    for name, chosen, count in components:
        if not chosen and count != 0 and name in needed:
            raise DataError(
                f"no example is left for {name}: {len(train)} to train on, {len(validation)} "
                f"held out, {len(test)} to test on",
                "at least one in each part that is asked for",
                "lower another count (data.train_examples=N), or leave the part out "
                f"(data.{name}_examples=0)",
            )
    return Splits(
        *(make_examples(spec, _named(part, folder)) for part in (train, validation, test))
    )


def _named(rows: list[Row], folder: Path) -> list[Row]:
    """Name a row by its place within the data folder, which may be elsewhere on another machine."""
    return [Row(row.values, row.place.removeprefix(f"{folder}/"), row.alternatives) for row in rows]


def fitting(rows: int, asked: Sequence[int | None], train: int) -> list[int | None]:
    """Return how many rows of a file each part gets; None is all that are left.

    The counts are as asked for if that leaves something for every part. In a smaller file every
    part but training gets at most a fifth, and training the rest.

    Args:
        asked: counts by part, in the order in which they are drawn.
        train: the index of training.
    """
    left, short = rows, False
    for wanted in asked:
        short |= left <= 0 and wanted != 0
        left -= rows if wanted is None else wanted
    if not short:
        return list(asked)
    others = [0 if i == train else _share(rows, count) for i, count in enumerate(asked)]
    most, rest = asked[train], rows - sum(others)
    kept: list[int | None] = list(others)
    kept[train] = rest if most is None else min(most, rest)
    return kept


def _share(rows: int, asked: int | None) -> int:
    """Return the rows of a held-out part: a fifth of the file, or fewer if fewer are asked for."""
    return rows // HELD_OUT if asked is None else min(asked, rows // HELD_OUT)


def _report_fewer(data: LlmDataConfig, train: int, validation: int) -> None:
    """Report that training gets fewer rows than asked for, because others are held out."""
    if validation and data.train_examples is not None and train < data.train_examples:
        report(f"data: {train} rows to train on; {validation} of the same file are held out")
