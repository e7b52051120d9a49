"""docs/settings.md and `qzo-diffuse settings` are what the code says."""

import functools
import json
import shlex
from pathlib import Path

import pytest

from qzo_diffusion import cli
from qzo_diffusion.config import described, kinds, reference
from qzo_diffusion.config.defaults import PICTURES, TEXTS, Formula, Rule, filled, flat, set_dotted
from qzo_diffusion.config.examples import EXAMPLES
from qzo_diffusion.config.files import make_config, parse_override
from qzo_diffusion.config.llm import LlmConfig
from qzo_diffusion.config.sections import usual
from qzo_diffusion.config.style import Config

DOCUMENT = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_document_is_that_of_the_code():
    assert DOCUMENT.read_text(encoding="utf-8") == reference.page(), (
        "run: python -m qzo_diffusion.config.reference > docs/settings.md"
    )


@pytest.mark.parametrize("kind", [Config, LlmConfig])
def test_every_setting_is_explained_and_in_the_document(kind):
    page = DOCUMENT.read_text(encoding="utf-8")
    for key, field in kinds.fields(kind).items():
        assert field.description, key
        assert f"| `{key}` |" in page


def test_every_setting_has_a_unit_and_an_example_and_nothing_else_has():
    assert EXAMPLES.keys() == {**kinds.fields(Config), **kinds.fields(LlmConfig)}.keys()
    for key, (unit, example) in EXAMPLES.items():
        assert unit, key
        assert shlex.split(example)[0].startswith(f"{key}=")


@functools.cache
def where_nothing_is_given(kind):
    return flat(make_config({}, kind).model_dump())


@pytest.mark.parametrize("key", EXAMPLES)
def test_an_example_is_taken_and_shows_another_value_than_the_usual_one(key):
    changed = set()
    for kind in (Config, LlmConfig):
        # of which language models take the usual value alone
        for_pictures = kind is LlmConfig and key in ("qzo.regions", "qzo.subspace")
        if key not in kinds.fields(kind) or for_pictures:
            continue
        settings = {}
        for text in shlex.split(EXAMPLES[key][1]):
            set_dotted(settings, *parse_override(text, kind))
        config = flat(make_config(settings, kind).model_dump())
        changed.add(config[key] != where_nothing_is_given(kind)[key])
    assert True in changed
    if key != "train.calibrate_lr":  # on for pictures already
        assert False not in changed


def settings_of(capsys, *arguments):
    assert cli.main(["settings", *arguments]) == 0
    return capsys.readouterr().out


def test_settings_are_listed_one_a_line(capsys):
    lines = settings_of(capsys).splitlines()
    assert len(lines) == len(EXAMPLES)
    assert any(line.split()[:3] == ["train.max_steps", "number", "of"] for line in lines)


@pytest.mark.parametrize(
    ("pattern", "keys"),
    [
        ("train.lr", {"train.lr"}),
        ("learning_rate", {"train.lr"}),  # another trainer's name
        ("patch_groups", {"qzo.regions"}),  # the field's word
        ("lora.*", {"lora.rank", "lora.alpha"}),
        ("PATIENCE", {"train.patience"}),
        ("mirror images", {"data.flip"}),  # in no name, but in a meaning
    ],
)
def test_a_setting_is_found_by_what_people_call_it(capsys, pattern, keys):
    assert {one["key"] for one in json.loads(settings_of(capsys, pattern, "--json"))} == keys


def test_a_setting_is_shown_with_all_that_there_is_to_know(capsys):
    shown = settings_of(capsys, "prior.bound")
    unit, example = EXAMPLES["prior.bound"]
    for part in (kinds.fields(Config)["prior.bound"].description.split("\n")[0], unit, example):
        assert part in shown
    assert "pictures, method is qzo" in shown
    assert ": 0.13" in shown
    assert "`" not in shown


def test_a_pattern_that_means_nothing_is_the_users_mistake(capsys):
    assert cli.main(["settings", "trian.lr"]) == 2
    error = capsys.readouterr().err
    assert "did you mean 'train.lr'?" in error


@pytest.mark.parametrize(("kind", "table"), [(Config, PICTURES), (LlmConfig, TEXTS)])
def test_rules_name_settings_that_exist_and_values_that_they_take(kind, table):
    known = kinds.fields(kind)
    for rule in table:
        assert {rule.setting, *rule.when} <= known.keys()
        assert rule.setting not in rule.when
        if not isinstance(rule.value, Formula):
            section, _, name = rule.setting.rpartition(".")
            made = known[rule.setting]
            assert described.in_words(made)
            assert kind.model_fields[section].annotation.model_fields[name] is made


@pytest.mark.parametrize("kind", [Config, LlmConfig])
@pytest.mark.parametrize("method", [None, "qzo", "quzo", "fo-scales", "mezo", "qlora"])
def test_settings_that_were_filled_in_once_stay(kind, method):
    """Filling in is idempotent: config.yaml, which holds all, means the same."""
    given = {} if method is None else {"method": method}
    once = filled(given, kind.table, usual(kind))
    assert filled(once, kind.table, usual(kind)) == once
    if not (kind is Config and method in ("mezo", "qlora")):
        config = make_config(given, kind)
        assert make_config(config.model_dump(), kind) == config


def test_what_is_given_is_never_replaced_and_nothing_of_it_changed():
    table = [Rule("a.b", 1), Rule("a.c", 2, {"a.b": (1, 3)}), Rule("d.e", 4, {"a.c": None})]
    given = {"a": {"b": 3}, "d": "no section"}
    assert filled(given, table, {}) == {"a": {"b": 3, "c": 2}, "d": "no section"}
    assert given == {"a": {"b": 3}, "d": "no section"}
    assert filled({"a": {"b": None, "c": {}}}, table, {"a.c": 9})["a"] == {"b": None, "c": {}}
