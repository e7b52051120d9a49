"""Texts on the command line and in files, keys that stand twice, other trainers' names."""

import argparse

import pytest
import yaml

from qzo_diffusion.config.files import (
    find_config,
    kind_of,
    load_config,
    make_config,
    parse_override,
    read_yaml,
    resolve_settings,
)
from qzo_diffusion.config.llm import LlmConfig
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.errors import ConfigError

TEXTS = [
    "artwork #3 in ink style",
    "a: b",
    "null",
    "~",
    "yes",
    "1e3",
    "007",
    "[a]",
    "{",
    " both ends ",
    "",
    "'quoted'",
    "x=1",
    "*a &b !c",
    "ünïcode → 好",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("key", ["data.caption", "data.trigger", "sample.negative_prompt"])
def test_a_text_is_taken_as_it_is(key, text, tmp_path):
    section, _, name = key.partition(".")
    config = make_config({section: {name: parse_override(f"{key}={text}")[1]}})
    assert getattr(getattr(config, section), name) == text
    (tmp_path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("text", ["007", "1e3", "yes", "2024-05-01", "1:30"])
def test_a_text_in_a_file_needs_no_quotation_marks(text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"model: {text}\ndata: {{trigger: {text}, caption: null}}\n")
    config = load_config(path)
    assert (config.model, config.data.trigger, config.data.caption) == (text, text, None)


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("data.cache_dir=null", Config, None),
        ("compute.vae_device=null", Config, None),
        ("data.dir=null", LlmConfig, None),
        ("model=null", Config, "null"),  # always a text
        ("data.dir=[a]", LlmConfig, "[a]"),
        ("qzo.layers=[a, b]", Config, ["a", "b"]),
        ("qzo.layers=null", Config, None),
        ("train.micro_batch_size=null", Config, None),
        ("qzo.normalize=false", Config, False),
        ("train.seed=010", Config, "010"),  # checked as ten, not as eight
    ],
)
def test_null_leaves_out_a_path_or_a_device(text, kind, value):
    assert parse_override(text, kind)[1] == value


def test_a_number_with_zeros_in_front_is_decimal():
    assert make_config({"train": {"seed": parse_override("train.seed=010")[1]}}).train.seed == 10
    with pytest.raises(ConfigError, match=r"train\.max_steps"):
        make_config({"train": {"max_steps": parse_override("train.max_steps=1:30")[1]}})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("train:\n  lr: 1\ndata: {}\ntrain:\n  seed: 2\n", ["'train'", "line 1", "line 4"]),
        ("train:\n  lr: 1\n  seed: 1\n  lr: 1\n", ["'train.lr'", "line 2", "line 4"]),
        ("train.lr: 1\ntrain:\n  lr: 2\n", ["'train.lr'", "line 1", "line 3"]),
        ("qzo:\n  regions: 4\n  patch_groups: 4\n", ["'qzo.regions'", "line 2", "line 3"]),
        ("qzo: {regions: 4}\nqzo.patch_groups: 4\n", ["'qzo.regions'", "line 1", "line 2"]),
    ],
)
def test_a_setting_that_stands_twice_is_named_with_both_lines(content, words, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as error:
        read_yaml(path)
    assert [word for word in words if word not in str(error.value)] == []


def test_dotted_keys_in_a_file_are_settings(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("train.lr: 0.05\ntrain:\n  max_steps: 7\ndata.trigger: 007\n")
    config = load_config(path)
    assert (config.train.lr, config.train.max_steps, config.data.trigger) == (0.05, 7, "007")


@pytest.mark.parametrize("kind", [Config, LlmConfig])
def test_the_fields_words_beside_the_old_ones(kind):
    new, old = ({"qzo": {name: 1, "layers": word}} for name, word in NAMES)
    assert make_config(new, kind) == make_config(old, kind)
    assert parse_override("qzo.patch_groups=1", kind) == ("qzo.regions", 1)
    stored = yaml.safe_load(make_config(new, kind).to_yaml())["qzo"]
    assert (stored["regions"], stored["layers"]) == (1, "quiet")
    with pytest.raises(ConfigError, match="by another name"):
        make_config({"qzo": {"regions": 1, "patch_groups": 2}}, kind)


NAMES = (("patch_groups", "middle"), ("regions", "quiet"))


@pytest.mark.parametrize(
    ("key", "kind", "meant"),
    [
        ("learning_rate", Config, "did you mean 'train.lr'"),
        ("train.learning_rate", Config, "did you mean 'train.lr'"),
        ("train.learning-rate", LlmConfig, "did you mean 'train.lr'"),
        ("max_train_steps", Config, "did you mean 'train.max_steps'"),
        ("steps", LlmConfig, "did you mean 'train.max_steps'"),
        ("train.train_batch_size", Config, "did you mean 'data.batch_size'"),
        ("prompt", Config, "did you mean 'sample.prompts'"),
        ("instance_prompt", Config, "did you mean 'data.caption'"),
        ("pretrained_model_name_or_path", LlmConfig, "did you mean 'model'"),
        ("mixed_precision", Config, "did you mean 'compute.dtype'"),
        ("guidance_scale", Config, "did you mean 'sample.guidance'"),
        ("sample.num_inference_steps", Config, "did you mean 'sample.steps'"),
        ("train.resolution", Config, "did you mean 'data.resolution'"),
        ("seed", Config, "did you mean 'train.seed'"),
        ("num_train_epochs", Config, "counted in steps"),
        ("train.epochs", LlmConfig, "counted in steps"),
        ("rank", Config, "no adapter is trained"),
        ("network_dim", Config, "no adapter is trained"),
        ("network_dim", LlmConfig, "did you mean 'lora.rank'"),
        ("output_dir", Config, "--output-dir"),
        ("gradient_checkpointing", Config, "backward pass"),
        ("train.eps", Config, "did you mean 'qzo.eps'"),
        ("trian.lr", Config, "did you mean 'train.lr'"),
        ("qzo.unquantized", Config, "a setting of `qzo-diffuse llm`"),
        ("sample.guidance", LlmConfig, "a setting of `qzo-diffuse train`"),
        ("train", Config, "it is a section"),
        ("x" * 30, Config, "`qzo-diffuse settings`"),
    ],
)
def test_an_unknown_setting_says_which_is_meant(key, kind, meant):
    with pytest.raises(ConfigError) as error:
        parse_override(f"{key}=1", kind)
    assert meant in error.value.remedy


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, Config),
        ({"model": "tiny"}, Config),
        ({"task": "rte"}, LlmConfig),
        ({"objective": "accuracy"}, LlmConfig),
        ({"method": "qlora"}, LlmConfig),
        ({"method": "quzo"}, Config),
        ({"data": {"dir": "sst", "batch_size": 4}}, LlmConfig),
        ({"qzo": {"unquantized": "all"}}, LlmConfig),
        ({"lora": {}}, LlmConfig),
        ({"data": {"style_dir": "a", "trigger": "b"}, "objective": "loss"}, Config),
    ],
)
def test_a_file_is_known_by_its_settings(settings, kind):
    assert kind_of(settings) is kind


@pytest.mark.parametrize("name", ["tiny", "tiny.yaml", "configs/tiny.yaml"])
def test_shipped_configs_are_found_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(find_config(name)).model == "tiny"
    with pytest.raises(ConfigError, match="one of default, demo"):
        find_config("tinny")


def options(*settings, **flags):
    known = {"preset": None, "config": None, "max_steps": None, "settings": list(settings)}
    return argparse.Namespace(**known | flags)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (options("train.seed=1", "train.seed=2"), "train.seed is given twice"),
        (options("train.max_steps=2", max_steps="1"), "train.max_steps is given twice"),
        (options("qzo.regions=1", "qzo.patch_groups=2"), "qzo.regions is given twice"),
        (options("train.max_steps=1", max_steps="1"), ""),
    ],
)
def test_the_last_of_two_values_counts_and_it_is_said(given, told, capsys):
    flags = {"--max-steps": ("train.max_steps", "")}
    config = resolve_settings(given, None, flags, Config)
    assert told in capsys.readouterr().err
    if told:
        assert 2 in (config.train.seed, config.train.max_steps, config.qzo.regions)


def test_an_escape_that_stands_for_no_character_is_refused(tmp_path):
    path = tmp_path / "config.yaml"
    for section, name in (("data", "caption"), ("data", "cache_dir"), ("sample", "prompts")):
        path.write_text(f'{section}:\n  {name}: "a\\ud800"\n')
        with pytest.raises(ConfigError, match=rf"{section}\.{name}"):
            load_config(path)
