"""docs/settings.md is what the code says."""

from pathlib import Path

import pytest

from qzo_diffusion.config import kinds, reference
from qzo_diffusion.config.defaults import PICTURES, TEXTS, Formula, Rule, filled
from qzo_diffusion.config.files import make_config
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


@pytest.mark.parametrize(("kind", "table"), [(Config, PICTURES), (LlmConfig, TEXTS)])
def test_rules_name_settings_that_exist_and_values_that_they_take(kind, table):
    known = kinds.fields(kind)
    for rule in table:
        assert {rule.setting, *rule.when} <= known.keys()
        assert rule.setting not in rule.when
        if not isinstance(rule.value, Formula):
            section, _, name = rule.setting.rpartition(".")
            made = known[rule.setting]
            assert reference.in_words(made)
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
