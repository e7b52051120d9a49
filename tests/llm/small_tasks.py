"""Examples of any task from a few rows, and a task file as a user would write it."""

import json

from qzo_diffusion.llm.data_files import read_rows
from qzo_diffusion.llm.task_file import read_task
from qzo_diffusion.llm.tasks import make_examples

FACTS = {
    "sst2": ({"sentence": "a good film", "label": "1"}, "a good film It was", " great"),
    "sst2_review": (
        {"sentence": "a good film", "label": "0"},
        "Review: a good film\nSentiment:",
        " negative",
    ),
    "rte": (
        {"sentence1": "It rains.", "sentence2": "It is wet.", "label": "not_entailment"},
        'It rains.\nDoes this mean that "It is wet." is true? Yes or No?\n',
        "No",
    ),
    "cb": (
        {"premise": "It rains.", "hypothesis": "it is wet", "label": "neutral"},
        'Suppose It rains. Can we infer that "it is wet"? Yes, No, or Maybe?\n',
        "Maybe",
    ),
    "boolq": (
        {"passage": "It rains.", "question": "is it wet", "label": True},
        "It rains. is it wet?\n",
        "Yes",
    ),
    "squad": (
        {
            "title": "Rain",
            "context": "It rains.",
            "question": "Is it wet?",
            "answers": ["yes", "It is"],
        },
        "Title: Rain\nContext: It rains.\nQuestion: Is it wet?\nAnswer:",
        " yes",
    ),
}


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
