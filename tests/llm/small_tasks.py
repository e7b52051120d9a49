"""Examples of any task from a few rows, and a task file as a user would write it."""

import json

from qzo_diffusion.llm.data_files import read_rows
from qzo_diffusion.llm.task_file import read_task
from qzo_diffusion.llm.tasks import make_examples


def examples_of(tmp_path, task, *rows):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = read_task(str(task))
    return spec, make_examples(spec, read_rows(path, spec.fields, spec.columns))


def own_task(tmp_path, **changes):
    """A task file of a user's; a change of None leaves the key out."""
    settings = {
        "name": "own",
        "train": ["data.jsonl"],
        "test": ["data.jsonl"],
        "template": "{text} It was",
        "label": "label",
        "choices": {"0": " terrible", "1": " great"},
        "metric": "accuracy",
    }
    path = tmp_path / "own.yaml"
    lines = {key: value for key, value in (settings | changes).items() if value is not None}
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in lines.items()))
    return path
