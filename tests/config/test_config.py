"""Settings: strict, told clearly, and every shipped file works."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qzo_diffusion.config.defaults import BOUND, set_dotted, suited_lr
from qzo_diffusion.config.files import (
    known_keys,
    load_config,
    make_config,
    parse_override,
    read_yaml,
)
from qzo_diffusion.config.llm import LlmConfig
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.errors import ConfigError
from qzo_diffusion.resources import shipped
from qzo_diffusion.runs import build

SHIPPED = sorted(shipped("configs").glob("*.yaml"))


def written(config):
    return yaml.load(config.to_yaml(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_are_valid_and_say_how_they_are_used(path):
    load_config(path)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any("qzo-diffuse train" in line for line in header)
    assert any("ardware" in line for line in header)
    assert any("esult" in line for line in header)


def test_the_presets_that_are_promised_exist():
    assert {"tiny", "paper", "default", "demo"} <= {path.stem for path in SHIPPED}


def test_the_contracts_keys_exist():
    fixed = (
        "data.resolution data.batch_size data.caption_dropout train.lr train.schedule qzo.eps "
        "qzo.num_directions "
        "qzo.parametrization quant.type quant.blocksize compute.device compute.dtype "
        "sample.guidance sigma.min sigma.max sample.tuned_between "
        "train.patience train.max_minutes"
    )
    assert set(fixed.split()) <= set(known_keys())


def test_yaml_round_trip(tmp_path):
    config = make_config({"train": {"lr": 0.5}, "data": {"caption": "ünïcode: [trigger]"}})
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train": {"lrr": 1}}, ["train.lrr", "did you mean 'train.lr'"]),
        ({"batch_size": 4}, ["batch_size", "did you mean 'data.batch_size'"]),
        ({"train": {"lr": -1e-3}}, ["train.lr", "-0.001", "greater than 0"]),
        ({"train": {"lr": "fast"}}, ["train.lr", "fast", "number"]),
        ({"train": {"lr": float("nan")}}, ["train.lr", "finite"]),
        ({"train": {"max_steps": -1}}, ["train.max_steps", "-1"]),
        ({"train": {"max_steps": 1.5}}, ["train.max_steps", "1.5", "integer"]),
        ({"data": {"resolution": 65}}, ["data.resolution", "multiple of 16"]),
        ({"data": {"batch_size": 0}}, ["data.batch_size", "0"]),
        ({"quant": {"type": "int3"}}, ["quant.type", "int3", "nf4"]),
        ({"qzo": {"units": "absolute"}}, ["absolute", "dense"]),
        ({"sigma": {"min": -0.1}}, ["sigma.min", "-0.1", "0"]),
        ({"sigma": {"max": 1.5}}, ["sigma.max", "1.5", "1"]),
        ({"sigma": {"min": 0.7, "max": 0.7}}, ["sigma", "min below max", "0.7"]),
        ({"sigma": {"max_timestep": 900}}, ["sigma.max_timestep", "did you mean 'sigma.max'"]),
        ({"train": 5}, ["train", "5"]),
        ({"qzo": {"layers": "quiett"}}, ["qzo.layers = 'quiett'", "list", "'quiet'"]),
        ({"qzo": {"layers": [3]}}, ["qzo.layers.0 = 3", "string"]),
    ],
)
def test_bad_settings_name_the_key_the_value_and_what_is_expected(settings, words):
    with pytest.raises(ConfigError) as error:
        make_config(settings)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.lr", "key=value"),
        ("train.lrr=1", "did you mean 'train.lr'"),
        ("lr=1", "did you mean"),
        ("train.lr=[", "YAML"),
    ],
)
def test_bad_overrides(text, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        parse_override(text)


def test_overrides_win_and_scientific_notation_is_a_number():
    settings = {"train": {"lr": 1.0}}
    set_dotted(settings, *parse_override("train.lr=1e-3"))
    set_dotted(settings, *parse_override("qzo.clip_threshold=null"))
    assert make_config(settings).train.lr == 1e-3


@pytest.mark.parametrize("content", ["a: [", "- 1", "just text", "\x00"])
def test_files_that_are_not_mappings_are_refused(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError):
        read_yaml(path)


def test_a_missing_file_and_an_empty_one(tmp_path):
    with pytest.raises(ConfigError, match=r"no file .*nowhere\.yaml"):
        read_yaml(tmp_path / "nowhere.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert load_config(tmp_path / "empty.yaml") == Config()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from([*Config.model_fields, "modle", "x"]), VALUES, max_size=4))
def test_any_mapping_gives_a_config_or_a_clear_error(settings):
    try:
        config = make_config(settings)
    except ConfigError:
        return
    assert written(config).keys() == Config.model_fields.keys()


@given(st.text(max_size=30))
def test_any_override_gives_a_pair_or_a_clear_error(text):
    try:
        key, _ = parse_override(text)
    except ConfigError:
        return
    assert key in known_keys()


EVER = 0.05  # of rows and inverse_sqrt, which needs no number of steps


@pytest.mark.parametrize(
    ("given", "per_example", "patch_groups", "normalize", "lr"),
    [
        ({}, True, 16, True, EVER),
        ({"parametrization": "layer"}, True, 16, True, suited_lr(1000)),
        ({"parametrization": "dense"}, False, 1, False, 3e-3),
        ({"num_directions": 4}, True, 16, True, EVER),
        ({"num_directions": 1}, True, 16, True, EVER / 1.6),
        ({"estimator": "antithetic"}, True, 16, True, EVER / 1.6),
        ({"num_directions": 4, "per_example": False}, False, 1, False, 3e-3),
        (
            {"num_directions": 4, "per_example": False, "normalize": True},
            False,
            1,
            True,
            suited_lr(1000, "antithetic") / 2,
        ),
        ({"per_example": False}, False, 1, False, 3e-3),
        ({"regions": 1}, True, 1, True, EVER),
        ({"normalize": False}, True, 16, False, 3e-3),
        ({"normalize": "running"}, True, 16, "running", EVER),
        (
            {"normalize": "running", "parametrization": "dense"},
            False,
            1,
            "running",
            suited_lr(1000, "antithetic"),
        ),
    ],
)
def test_what_is_not_given_follows_from_what_is(given, per_example, patch_groups, normalize, lr):
    config = make_config({"qzo": given})
    found = (config.qzo.per_example, config.qzo.regions, config.qzo.normalize, config.train.lr)
    assert found == (per_example, patch_groups, normalize, pytest.approx(lr))
    usual = per_example and normalize and given.get("parametrization") is None
    assert config.train.schedule == ("inverse_sqrt" if usual else "cosine")
    assert make_config(written(config)) == config


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"regions": 4, "per_example": False}, "regions above 1 need per_example"),
        ({"regions": 4, "parametrization": "dense"}, "regions above 1 need per_example"),
        ({"normalize": True, "parametrization": "dense"}, "only the sign would be left"),
        ({"regions": 0}, "greater than or equal to 1"),
        (
            {"estimator": "leave_one_out", "num_directions": 1},
            "leave_one_out needs num_directions: 2 or more",
        ),
        (
            {"estimator": "leave_one_out", "parametrization": "dense"},
            "leave_one_out needs num_directions: 2 or more",
        ),
        ({"estimator": "one_sided"}, "'antithetic' or 'leave_one_out'"),
    ],
)
def test_settings_that_contradict_each_other(given, word):
    with pytest.raises(ConfigError, match=word):
        make_config({"qzo": given})


@pytest.mark.parametrize(
    ("settings", "num_directions", "estimator", "batch_size"),
    [
        ({}, 8, "leave_one_out", 4),
        ({"qzo": {"num_directions": 4}}, 4, "leave_one_out", 8),
        ({"qzo": {"num_directions": 1}}, 1, "antithetic", 16),
        ({"qzo": {"num_directions": 100}}, 100, "leave_one_out", 1),
        ({"qzo": {"estimator": "antithetic"}}, 1, "antithetic", 16),
        ({"qzo": {"parametrization": "dense"}}, 1, "antithetic", 16),
        (
            {
                "qzo": {
                    "parametrization": "dense",
                    "num_directions": 8,
                    "estimator": "leave_one_out",
                }
            },
            8,
            "leave_one_out",
            16,
        ),
        ({"data": {"batch_size": 16}}, 8, "leave_one_out", 16),
        ({"method": "quzo"}, 8, "leave_one_out", 4),
        ({"method": "quzo", "qzo": {"parametrization": "codes"}}, 1, "antithetic", 16),
        ({"method": "fo-scales"}, 1, "antithetic", 16),
        ({"method": "fo-scales", "qzo": {"parametrization": "row"}}, 8, "leave_one_out", 16),
    ],
)
@pytest.mark.parametrize("kind", [Config, LlmConfig])
def test_a_step_has_as_many_forwards_however_it_probes(
    settings, num_directions, estimator, batch_size, kind
):
    config = make_config(settings, kind)
    assert (config.qzo.num_directions, config.qzo.estimator, config.data.batch_size) == (
        num_directions,
        estimator,
        batch_size,
    )
    assert make_config(written(config), kind) == config


@pytest.mark.parametrize(
    ("micro", "qzo", "probes_per_forward", "examples"),
    [
        (None, {}, 8, 4),
        (1, {}, 1, 1),
        (6, {}, 6, 1),
        (16, {}, 8, 2),
        (None, {"num_directions": 1}, 2, 16),
        (1, {"num_directions": 1}, 1, 1),
        (8, {"num_directions": 1}, 2, 4),
        (8, {"parametrization": "dense"}, 1, 8),
    ],
)
def test_a_micro_batch_holds_examples_with_all_their_probes_or_some_probes_of_one(
    micro, qzo, probes_per_forward, examples
):
    config = make_config({"train": {"micro_batch_size": micro}, "qzo": qzo})
    assert build.probing(config).probes_per_forward == probes_per_forward
    assert build.micro_batch_size(config, config.data.batch_size) == examples


def test_the_rate_falls_with_the_root_of_the_steps():
    """In advance, or, with inverse_sqrt, as they are made."""

    def rates(**train):
        return [
            make_config({"train": {"max_steps": steps, **train}}).train.lr
            for steps in (0, 1, 100, 500, 2000, 20_000)
        ]

    assert rates(schedule="cosine") == pytest.approx([0.08, 0.08, 0.08, 0.04, 0.02, 0.04 / 40**0.5])
    assert rates() == rates(schedule="inverse_sqrt") == pytest.approx([0.05] * 6)
    assert rates(lr=0.2) == [0.2] * 6


@pytest.mark.parametrize(
    ("given", "schedule"),
    [
        ({"train": {"lr": 0.05}}, "inverse_sqrt"),
        ({"train": {"schedule": "linear"}}, "linear"),
        ({"method": "fo-scales"}, "cosine"),
        ({"method": "fo-scales", "qzo": {"parametrization": "separable"}}, "cosine"),
        ({"method": "quzo", "qzo": {"parametrization": "codes"}}, "linear"),
    ],
)
def test_pictures_have_a_rate_that_falls_by_itself(given, schedule):
    assert make_config(given).train.schedule == schedule
    assert make_config(given).qzo.regions == (16 if "method" not in given else 1)
    if "method" not in given:
        assert make_config(given, LlmConfig).train.schedule == given["train"].get(
            "schedule", "cosine"
        )


@pytest.mark.parametrize(
    ("given", "calibrated"),
    [
        ({}, True),
        ({"qzo": {"eps": 0.02}}, True),
        ({"train": {"lr": 0.05}}, False),
        ({"train": {"lr": 0.05, "calibrate_lr": True}}, True),
        ({"train": {"calibrate_lr": False}}, False),
        ({"qzo": {"parametrization": "layer"}}, False),  # nothing was measured there
        ({"qzo": {"parametrization": "separable"}}, True),
        ({"qzo": {"normalize": False}}, False),
        ({"qzo": {"parametrization": "dense"}}, False),
        ({"method": "fo-scales"}, False),
        ({"method": "quzo", "qzo": {"parametrization": "codes"}}, False),
    ],
)
def test_a_rate_that_nobody_chose_is_calibrated_for_pictures(given, calibrated):
    config = make_config(given)
    assert config.train.calibrate_lr == calibrated
    assert make_config(written(config)) == config
    if "method" not in given:
        assert make_config(given, LlmConfig).train.calibrate_lr == given.get("train", {}).get(
            "calibrate_lr", False
        )


@pytest.mark.parametrize("steps", [float("inf"), "many", None, [1]])
def test_what_is_no_number_of_steps_is_told(steps):
    with pytest.raises(ConfigError, match=r"train\.max_steps"):
        make_config({"train": {"max_steps": steps, "schedule": "cosine"}})


def test_a_step_has_as_many_scalars_as_its_record_holds():
    build.check_scalars(make_config({}), 63, 16)
    build.check_scalars(make_config({"qzo": {"parametrization": "dense"}}), 10_000)
    with pytest.raises(ConfigError, match=r"8192 scalars") as error:
        build.check_scalars(make_config({}), 64, 16)
    assert "8187" in error.value.expected


def test_pictures_are_bounded_unless_a_file_of_an_earlier_run_says_nothing_of_it(tmp_path):
    both = {"qzo": {"parametrization": "separable"}}
    assert make_config(both).prior.bound == BOUND
    assert make_config({}).prior.bound is None
    settings = make_config(both).model_dump()
    del settings["prior"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert load_config(tmp_path / "config.yaml").prior.bound is None
    (tmp_path / "own.yaml").write_text("qzo: {parametrization: separable}")
    assert load_config(tmp_path / "own.yaml").prior.bound == BOUND


def test_styles_train_rows_of_the_image_stream_and_rewards_rows_and_columns():
    def trained(settings):
        qzo = make_config(settings).qzo
        return qzo.parametrization, qzo.layers

    assert trained({}) == trained({"qzo": {"parametrization": "row"}}) == ("row", "image")
    assert trained({"qzo": {"parametrization": "separable"}}) == ("separable", None)
    assert trained({"qzo": {"layers": ["attn"]}}) == ("row", ["attn"])
    rewards = {"scores": ["brightness"], "prompts": "prompts.txt"}
    assert trained({"reward": rewards}) == ("separable", None)


@pytest.mark.parametrize("prior", [{"decay": 0.1}, {"bound": 0.1}])
def test_numbers_without_a_distance_from_the_base_have_no_prior(prior):
    with pytest.raises(ConfigError, match=r"qzo\.parametrization: row, layer, column"):
        make_config({"prior": prior, "qzo": {"parametrization": "dense"}})


def test_a_decay_that_would_turn_numbers_around_is_refused():
    with pytest.raises(ConfigError, match="at most 1"):
        make_config({"prior": {"decay": 11.0}, "train": {"lr": 0.1}})


def test_only_a_normalised_rate_can_be_calibrated():
    with pytest.raises(ConfigError, match=r"calibrate_lr: false, or qzo\.normalize"):
        make_config({"train": {"calibrate_lr": True}, "qzo": {"parametrization": "dense"}})


@pytest.mark.parametrize(("kind", "rate"), [(Config, 0.04), (LlmConfig, 0.04)])
def test_the_rate_follows_from_steps_that_were_said_by_a_flag(kind, rate):
    """A flag's value is text until the settings are checked."""
    assert make_config(
        {"train": {"max_steps": "500", "schedule": "cosine"}}, kind
    ).train.lr == pytest.approx(rate)
    with pytest.raises(ConfigError, match=r"train\.max_steps"):
        make_config({"train": {"max_steps": "many"}}, kind)
