"""Names in the documents exist: flags, verbs, settings, presets, files, links, decisions."""

import re

import pytest

from qzo_diffusion.config.llm import LlmConfig
from tests.conftest import LONGEST
from tests.documents import (
    DECISIONS,
    DOCUMENTS,
    METADATA,
    ROOT,
    SOURCES,
    broken_links,
    decisions,
    strings_of,
    text_of,
    verbs,
    wrong_citations,
    wrong_files,
    wrong_flags,
    wrong_settings,
)


def every_document(check):
    return pytest.mark.parametrize(
        "path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix()
    )(check)


@every_document
def test_flags_and_verbs_exist(path):
    assert wrong_flags(text_of(path)) == []


@every_document
def test_settings_exist(path):
    assert wrong_settings(text_of(path)) == []


def test_settings_that_the_code_names_exist():
    package = [path for path in SOURCES if path.is_relative_to(ROOT / "qzo_diffusion")]
    metadata = {f"qzo.{name}" for name in METADATA}
    named = {path.name: wrong_settings("\n".join(strings_of(path))) for path in package}
    wrong = {name: set(keys) - metadata for name, keys in named.items()}
    assert {name: keys for name, keys in wrong.items() if keys} == {}


@every_document
def test_presets_formats_and_methods_exist(path):
    text = text_of(path)
    presets = {config.stem for config in (ROOT / "configs").glob("*.yaml")}
    named = {*re.findall(r"--preset (\w+)", text), *re.findall(r"`(sd35_\w+gb)`", text)}
    assert named - {"NAME"} <= presets
    (formats,) = (a.choices for a in verbs()["export"]._actions if "--format" in a.option_strings)
    assert set(re.findall(r"--format ([a-z]\w*)", text)) <= set(formats)
    methods = set(LlmConfig.model_fields["method"].annotation.__args__)
    assert set(re.findall(r"--method ([a-z][\w-]*)", text)) <= methods


def test_the_document_says_that_diffusers_needs_a_gpu_and_which_check_was_patched():
    text = text_of(ROOT / "docs" / "sd35.md")
    assert "No GPU found" in text
    table = [line for line in text.splitlines() if "patched" in line]
    assert table
    assert not any("plain" in line for line in table)


@every_document
def test_links_files_modules_and_targets_exist(path):
    text = text_of(path)
    assert broken_links(path, text) == []
    assert wrong_files(text, (ROOT, ROOT / "qzo_diffusion", path.parent)) == []
    for module in re.findall(r"python -m (benchmarks[\w.]*\w)", text):
        place = ROOT / module.replace(".", "/")
        assert place.is_dir() or place.with_suffix(".py").is_file(), module
    targets = set(re.findall(r"^([a-z][\w-]*):", text_of(ROOT / "Makefile"), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z][\w-]*)", text, re.MULTILINE)) <= targets


def test_documents_that_the_code_names_exist():
    wrong = {path.name: wrong_files(text_of(path)) for path in SOURCES}
    assert {name: files for name, files in wrong.items() if files} == {}


def test_decisions_are_short_and_in_the_index():
    index = text_of(DECISIONS / "README.md")
    for number, (name, lines) in decisions().items():
        assert len(lines) <= 8, number
        assert any("Status:" in line for line in lines), number
        row = next(line for line in index.splitlines() if f"]({name})" in line)
        assert re.search(rf"\b{number} ", row), f"{number} is missing in the index"
    assert max(int(number[1:]) for number in decisions()) < int(
        re.search(r"next free number is (\d+)", index)[1]
    )


def test_cited_decisions_exist():
    documents = [*DOCUMENTS, *SOURCES]
    wrong = {str(path): wrong_citations(text_of(path)) for path in documents}
    assert {path: ids for path, ids in wrong.items() if ids} == {}


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "CHANGELOG.md", ROOT / "NOTICE"], ids=str)
def test_nothing_names_a_machine_or_a_user(path):
    assert re.findall(r"(?<![\w.~])/(?:home|root|Users|tmp|work|mnt|data)/\S*", text_of(path)) == []


def test_results_name_no_machine_or_user():
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert not re.search(r'"/|[ =]/(?:home|root|Users|tmp|work|mnt)/', text_of(path)), path.name


def test_the_test_files_that_begin_first_are_there():
    assert [name for name in LONGEST if not (ROOT / "tests" / name).is_file()] == []


def test_the_readme_fits_on_one_screen():
    assert len(text_of(ROOT / "README.md").splitlines()) <= 80


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (wrong_flags, "`qzo-diffuse sample --promts FILE`"),
        (wrong_flags, "`qzo-diffuse report --max-steps 3`"),
        (wrong_flags, "`qzo-diffuse tune`"),
        (wrong_settings, "set `train.learn_rate=0.1`"),
        (wrong_files, "see core/no_such_file.py"),
        (wrong_citations, "docs/decisions/rates.md D1"),
        (wrong_citations, "as D999 says"),
    ],
)
def test_the_checks_find_what_is_wrong(check, text):
    assert check(text) != []
