"""Task files and data files: read as they are meant, and what is wrong is told by its line."""

import sys
from pathlib import Path

import pytest

from qzo_diffusion.core.errors import ConfigError, DataError
from qzo_diffusion.llm.data_files import data_folder, find_data, read_rows
from qzo_diffusion.llm.task_file import fill, read_task
from qzo_diffusion.llm.tasks import make_examples
from tests.llm.small_tasks import examples_of, own_task


def test_the_fields_of_a_template_are_filled_and_nothing_else():
    assert fill("{{x}} {a}{b}", {"a": "{b}", "b": "2"}) == "{x} {b}2"


@pytest.mark.parametrize(
    ("change", "line", "field"),
    [
        ({"template": "{text!r}"}, 4, "template"),
        ({"template": "{text.__class__}"}, 4, "template"),
        ({"template": "{text"}, 4, "template"),
        ({"choices": {"0": " great"}}, 6, "choices"),
        ({"choices": {"0": " great", "1": " great"}}, 6, "choices"),
        ({"metric": "speed"}, 7, "metric"),
        ({"metric": "f1"}, 1, "metric accuracy"),
        ({"answer": "x"}, 1, "either label and choices"),
        ({"label": None}, 1, "label and choices together"),
        ({"train": []}, 2, "train"),
        ({"colour": "red"}, 8, "colour"),
        ({"name": None}, 1, "name"),
        ({"name": "x/../../evil"}, 1, "name"),
        ({"name": ".own"}, 1, "name"),
        ({"choices": {"0": True, "1": " great"}}, 6, "in quotation marks"),
    ],
)
def test_a_wrong_task_file_is_told_by_line_and_field(tmp_path, change, line, field):
    path = own_task(tmp_path, **change)
    with pytest.raises(ConfigError, match=f"line {line}:") as raised:
        read_task(str(path))
    assert field in str(raised.value)


def test_an_unknown_task_names_those_that_there_are():
    with pytest.raises(ConfigError, match="boolq, cb, rte, squad, sst2"):
        read_task("sst3")


@pytest.mark.parametrize(
    ("name", "text", "wrong"),
    [
        ("d.tsv", "good\t1\nbad\n", "line 2: 1 columns"),
        ("d.tsv", "", "no example"),
        ("d.jsonl", '{"sentence": "x", "label": 1}\n{"sentence": "x"}\n', "line 2 has 'sentence'"),
        ("d.jsonl", "{\n", "line 1 is not JSON"),
        ("d.jsonl", "[1]\n", "line 1 holds a list"),
        ("d.json", '{"data": [{"paragraphs": [{}]}]}', "without 'qas'"),
        ("d.json", '[{"sentence": [], "label": "1"}]', "sentence is empty"),
        ("d.json", '[{"sentence": {"text": [null]}, "label": "1"}]', "sentence is empty"),
        (
            "d.jsonl",
            '{"sentence": {"words": "x"}, "label": 1}\n',
            "line 1: sentence holds an object",
        ),
        ("d.jsonl", '{"sentence": [["x"]], "label": 1}\n', "line 1: sentence holds lists"),
        ("d.jsonl", '{"sentence": null, "label": 1}\n', "line 1 has 'label'"),
        ("d.json", "[" * 100_000, "is not JSON"),
        ("d.tsv", "good\t1\n\n\nbad\n", "line 4: 1 columns"),
        ("d.csv", 'good,1\n\n"a\nb",1\nbad\n', "line 5: 1 columns"),
        ("d.csv", f'good,1\n"{"x" * 140_000}",1\n', "line 2: field larger"),
        ("d.txt", "x", "ending in"),
    ],
)
def test_wrong_data_is_told_by_its_line(tmp_path, name, text, wrong):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as raised:
        read_rows(tmp_path / name, ["sentence", "label"], ["sentence", "label"])
    assert wrong in str(raised.value)


def test_a_line_of_names_is_read_as_such(tmp_path):
    (tmp_path / "d.tsv").write_text('label\tindex\tsentence\n1\t7\ta "good film\n')
    (tmp_path / "d.csv").write_text('sentence,label\n"a, film",0\n')
    rows = read_rows(tmp_path / "d.tsv", ["sentence", "label"], [])
    assert [row.values for row in rows] == [
        {"label": "1", "index": "7", "sentence": 'a "good film'}
    ]
    assert read_rows(tmp_path / "d.csv", ["sentence", "label"], [])[0].values == {
        "sentence": "a, film",
        "label": "0",
    }


def test_a_quoted_cell_holds_what_it_holds(tmp_path):
    (tmp_path / "d.csv").write_bytes(
        b'sentence,label\r\n"good\r\nfilm",1\r\n\r\nx\xe2\x80\xa8y,0\r\n'
    )
    rows = read_rows(tmp_path / "d.csv", ["sentence", "label"], [])
    assert [(row.values["sentence"], row.place.split(", ")[1]) for row in rows] == [
        ("good\nfilm", "line 2"),
        ("x\u2028y", "line 5"),
    ]


def test_answers_of_squad_are_read_as_datasets_writes_them(tmp_path):
    row = {
        "title": "T",
        "context": "C",
        "question": "Q",
        "id": None,
        "answers": {"text": ["A", "B"], "answer_start": [1, 2]},
    }
    _, (example,) = examples_of(tmp_path, "squad", row | {"read_by_nobody": {"a": 1}, "nor": []})
    assert example.answers == ("A", "B")
    assert example.continuations == (" A",)


def test_choices_that_yaml_takes_for_truth_values_are_words(tmp_path):
    path = own_task(tmp_path, choices=None)
    path.write_text(path.read_text() + 'choices:\n  no: " terrible"\n  Yes: " great"\n')
    assert read_task(str(path)).choices == {"no": " terrible", "Yes": " great"}
    path.write_text(path.read_text().replace("  no:", "  False:").replace("Yes:", "true:"))
    assert read_task(str(path)).choices == {"false": " terrible", "true": " great"}


def test_a_label_that_is_no_choice_is_told(tmp_path):
    with pytest.raises(DataError, match=r"line 1: label = 'fine'"):
        examples_of(tmp_path, "sst2", {"sentence": "x", "label": "fine"})


@pytest.fixture
def cached_dataset(tmp_path, monkeypatch):
    """A folder of dataset org/name in a local cache of the Hub, as `hf download` leaves it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "datasets--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    folder = repo / "snapshots" / commit / "sst2"
    folder.mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder


def test_a_dataset_is_found_in_the_local_cache_of_the_hub(cached_dataset):
    (cached_dataset / "train.tsv").write_text("good\t1\n")
    (cached_dataset / "validation-00000-of-00001.parquet").touch()
    assert data_folder("org/name/sst2") == cached_dataset
    assert data_folder("org/name") == cached_dataset.parent
    assert find_data(cached_dataset, ["train.tsv"]).name == "train.tsv"
    assert find_data(cached_dataset, ["dev.tsv"]).name == "validation-00000-of-00001.parquet"


@pytest.mark.parametrize(
    "name", ["org/other", "org/name/rte", "org/name/sst2/../..", "/org/name", "name", "org/na me"]
)
def test_what_is_neither_a_folder_nor_a_dataset_is_told(cached_dataset, name):
    with pytest.raises(DataError, match="--repo-type dataset"):
        data_folder(name)


def test_parquet_without_its_reader_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "d.parquet").touch()
    with pytest.raises(DataError, match=r"qzo-diffusion\[parquet\]"):
        read_rows(tmp_path / "d.parquet", ["sentence"], [])


def test_parquet_of_the_hub_is_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is an extra: pip install pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"sentence": "good", "label": 1, "idx": 0}, {"sentence": "bad", "label": 0, "idx": 1}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert [
        row.values["label"] for row in read_rows(tmp_path / "d.parquet", ["sentence", "label"], [])
    ] == ["1", "0"]
    asked = [{"question": "Who?", "answers": {"text": ["A", "B"], "answer_start": [0, 4]}}]
    parquet.write_table(pyarrow.Table.from_pylist(asked), tmp_path / "q.parquet")
    (row,) = read_rows(tmp_path / "q.parquet", ["question", "answers"], [])
    assert row.alternatives["answers"] == ("A", "B")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="can't be read"):
        read_rows(tmp_path / "bad.parquet", ["a"], [])


def test_shared_data_is_read_where_it_is():
    folder = Path(__file__).parents[3] / "shared" / "data" / "text"
    if not folder.is_dir():
        pytest.skip("no ../shared/data/text: real data is not in the repository")
    counts = {
        "sst2/train.tsv": ("sst2", 6920),
        "rte/dev.tsv": ("rte", 277),
        "rte/val.tsv": ("rte", 363),
    }
    counts |= {
        "superglue_CB/val.jsonl": ("cb", 56),
        "superglue_BoolQ/val.jsonl": ("boolq", 3270),
        "xquad.en.json": ("squad", 1190),
    }
    for name, (task, count) in counts.items():
        spec = read_task(task)
        assert (
            len(make_examples(spec, read_rows(folder / name, spec.fields, spec.columns))) == count
        ), name


def test_columns_whose_names_hold_spaces(tmp_path):
    (tmp_path / "d.csv").write_text("Review Text,Class Index\na film,1\n")
    path = own_task(tmp_path, template="{Review Text} It was", label="Class Index")
    spec = read_task(str(path))
    assert spec.fields == ["Review Text", "Class Index"]
    (example,) = make_examples(spec, read_rows(tmp_path / "d.csv", spec.fields, spec.columns))
    assert (example.prompt, example.label) == ("a film It was", 1)


def test_names_of_columns_are_quoted_where_they_are_told(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"Review Text": "a", "b, c": "d"}\n')
    with pytest.raises(DataError, match="has 'Review Text', 'b, c'"):
        read_rows(tmp_path / "d.jsonl", ["text"], [])
    (tmp_path / "d.csv").write_text("a,b,c\n")
    with pytest.raises(DataError, match="a first line with the names 'Review Text', 'Class Index'"):
        read_rows(tmp_path / "d.csv", ["Review Text", "Class Index"], [])


@pytest.mark.parametrize("name", ["Train.TSV", "train.TSV", "TRAIN.tsv"])
def test_upper_case_endings_and_names_are_found(tmp_path, name):
    (tmp_path / name).write_text("text\tlabel\nfine\t1\n")
    found = find_data(tmp_path, ["train.tsv"])
    assert found.name == name
    assert read_rows(found, ["text", "label"], [])[0].values == {"text": "fine", "label": "1"}


def test_an_upper_case_ending_of_json_lines(tmp_path):
    (tmp_path / "d.JSONL").write_text('{"text": "fine"}\n')
    assert len(read_rows(tmp_path / "d.JSONL", ["text"], [])) == 1
