"""Data that lies elsewhere when a run goes on: its content decides, not its place."""

import json
from dataclasses import dataclass, field

import pytest

from qzo_diffusion.config.files import make_config
from qzo_diffusion.config.llm import LlmConfig
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.errors import ConfigError
from qzo_diffusion.runs import training


@dataclass
class Plan:
    """As much of a plan as `resume` looks at before anything is loaded."""

    config: Config
    rows: list = field(default_factory=lambda: [{"file": "a/1.png", "sha256": "aa"}])
    thing = "image"
    facts = ("sha256",)
    has_journal = False

    def data(self):
        return self.rows


def of(kind, place, cache="/cache"):
    if kind is LlmConfig:
        return make_config({"data": {"dir": place}}, kind)
    return make_config({"data": {"style_dir": place, "validation_dir": place, "cache_dir": cache}})


@pytest.fixture
def go_on(tmp_path, monkeypatch):
    """Resumes `before` as `after`; gives the changes that the run takes note of."""
    monkeypatch.setattr(training, "_lead", lambda plan, out, ranks, changed: changed)

    def call(before, after, **options):
        (tmp_path / "config.yaml").write_text(before.config.to_yaml())
        (tmp_path / "dataset.json").write_text(json.dumps(before.rows))
        return training.resume(after, tmp_path, **options)

    return call


@pytest.mark.parametrize("kind", [Config, LlmConfig])
def test_the_same_data_elsewhere_is_no_change(go_on, kind):
    before, after = Plan(of(kind, "/old/imgs")), Plan(of(kind, "/new/place", "/other"))
    assert go_on(before, after) == []
    assert go_on(before, Plan(of(kind, "/old/imgs"))) == []


@pytest.mark.parametrize(
    "rows", [[{"file": "a/1.png", "sha256": "bb"}], [{"file": "1.png", "sha256": "aa"}], []]
)
def test_other_data_elsewhere_is_a_change_of_both(go_on, rows):
    before, after = Plan(of(Config, "/old/imgs")), Plan(of(Config, "/new/imgs"), rows)
    with pytest.raises(ConfigError, match=r"data\.style_dir: '/old/imgs' -> '/new/imgs'"):
        go_on(before, after)
    assert len(go_on(before, after, force=True)) > 2


def test_moved_data_hides_no_other_setting(go_on):
    after = of(Config, "/new/imgs")
    after.data.caption = "another"
    with pytest.raises(ConfigError, match=r"data\.caption") as error:
        go_on(Plan(of(Config, "/old/imgs")), Plan(after))
    assert "style_dir" not in str(error.value)
