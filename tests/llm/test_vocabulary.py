"""Tokens that the model has no embedding for, and text that can't be encoded, are told by file and
line before a model is loaded.
"""

import json

import pytest

from qzo_diffusion.cli import main
from qzo_diffusion.core.errors import ConfigError, DataError
from qzo_diffusion.llm.data_files import read_rows
from qzo_diffusion.llm.task_file import read_task
from qzo_diffusion.llm.tasks import encode
from tests.conftest import failing
from tests.llm.small_tasks import examples_of, own_task
from tests.tiny_llama import save_tiny_llama, tiny_llama


@pytest.fixture(scope="module")
def added(tmp_path_factory):
    """A model whose tokenizer got two tokens that it was not resized for."""
    folder = save_tiny_llama(tmp_path_factory.mktemp("model"))
    words = tiny_llama().tokenizer
    words.add_tokens(["<|im_start|>", "<|im_end|>"])
    words.save_pretrained(folder)
    return folder


def dry_run(tmp_path, model, task):
    return main(
        [
            "llm",
            "train",
            "--dry-run",
            f"--task={task}",
            f"--model={model}",
            f"--data-dir={tmp_path}",
            "data.train_examples=7",
            "data.validation_examples=1",
            "data.test_examples=1",
        ]
    )


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"template": "<|im_start|>{text} It was"}, "own.yaml, line 4: template"),
        ({"choices": {"0": " bad<|im_end|>", "1": " good"}}, "own.yaml, line 6: choices"),
    ],
)
def test_a_token_of_the_task(tmp_path, added, capsys, changes, line):
    rows = [{"text": f"film {index}", "label": "0"} for index in range(9)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    error = failing(capsys, dry_run(tmp_path, added, own_task(tmp_path, **changes)))
    assert line in error
    assert "<|im_" in error
    assert "no embedding" in error


@pytest.mark.parametrize("ending", ["tsv", "csv", "jsonl", "json"])
def test_a_token_of_the_data(tmp_path, added, capsys, ending):
    rows = [("a film", "0")] * 4 + [("a <|im_end|> film", "1")] + [("a film", "0")] * 4
    objects = [dict(zip(("text", "label"), row, strict=True)) for row in rows]
    text = {
        "tsv": "text\tlabel\n" + "\n".join(map("\t".join, rows)),
        "csv": "text,label\n" + "\n".join(map(",".join, rows)),
        "jsonl": "\n".join(map(json.dumps, objects)),
        "json": json.dumps(objects),
    }[ending]
    name = f"data.{ending}"
    (tmp_path / name).write_text(text)
    task = own_task(tmp_path, train=[name], test=[name])
    error = failing(capsys, dry_run(tmp_path, added, task))
    place = {"tsv": "line 6", "csv": "line 6", "jsonl": "line 5", "json": "entry 5"}[ending]
    assert f"{name}, {place}:" in error


def test_tokens_that_are_not_used_do_no_harm(tmp_path, added):
    rows = [{"text": f"film {index}", "label": "0"} for index in range(9)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert dry_run(tmp_path, added, own_task(tmp_path)) == 0


def test_without_a_plan_the_encoder_tells(tmp_path):
    lm = tiny_llama()
    lm.tokenizer.add_tokens(["<new>"])
    _, examples = examples_of(
        tmp_path,
        own_task(tmp_path),
        {"text": "fine", "label": "0"},
        {"text": "<new>", "label": "1"},
    )
    with pytest.raises(DataError, match=r"data\.jsonl, line 2: token '<new>'"):
        encode(lm, examples, None)


def test_half_a_pair_in_data(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "fine \\ud83d\\ude00"}\n{"text": "half \\ud83d"}\n')
    with pytest.raises(DataError, match=r"d\.jsonl, line 2, text: 'half \\ud83d' holds half"):
        read_rows(path, ["text"], [])
    (tmp_path / "d.json").write_text('[{"answers": ["a", "\\udc00"]}]')
    with pytest.raises(DataError, match=r"d\.json, entry 1, answers: .* holds half"):
        read_rows(tmp_path / "d.json", ["answers"], [])


@pytest.mark.parametrize(
    "changes",
    [
        {"template": "{text} \ud83d"},
        {"choices": {"0": "\udc00", "1": "good"}},
        {"stop": "\ud800"},
        {"label": None, "choices": None, "answer": "{text}\udfff", "metric": "f1"},
    ],
)
def test_half_a_pair_in_a_task(tmp_path, changes):
    task = own_task(tmp_path, **changes)
    with pytest.raises(ConfigError, match=r"own\.yaml, line \d") as caught:
        read_task(str(task))
    assert "surrogate" in caught.value.expected


def test_both_halves_in_a_task_are_one_character(tmp_path):
    task = own_task(tmp_path, template="{text} \U0001f600")  # JSON writes two escapes
    assert "\\ud83d\\ude00" in task.read_text()
    assert read_task(str(task)).template == "{text} \U0001f600"
