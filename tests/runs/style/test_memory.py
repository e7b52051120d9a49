"""The memory plan and the presets, on the real architectures."""

import json
import math
import shlex
import shutil
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from qzo_diffusion import devices
from qzo_diffusion.cli import main
from qzo_diffusion.config.files import load_config, make_config, read_yaml
from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.diffusion import memory
from qzo_diffusion.diffusion.families.sd3 import SD3
from qzo_diffusion.diffusion.pipeline_shape import known_shape
from qzo_diffusion.diffusion.transformer import empty_transformer
from qzo_diffusion.quant.base import linears_to_quantize
from qzo_diffusion.resources import shipped, tiny_model
from qzo_diffusion.runs import hub
from qzo_diffusion.runs.style import choose_model as choosing
from qzo_diffusion.runs.style import doctor, pipeline
from qzo_diffusion.runs.style import memory as planning
from qzo_diffusion.runs.style.choose_model import choose_model
from tests.conftest import failing
from tests.runs.style.full_size import CPU, LARGE, MEDIUM, T5, TWICE

T5 |= {"feed_forward_proj": "gated-gelu"}


WANTED = {
    *(
        "model_index.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    ),
    *(
        "text_encoder_3/model-00001-of-00002.safetensors",
        "tokenizer/merges.txt",
        "tokenizer_3/spiece.model",
        "vae/config.json",
    ),
}


PRESETS = {
    "sd35_large_8gb": LARGE,
    "sd35_large_24gb": LARGE,
    "sd35_medium": MEDIUM,
    "sd35_large_paper": LARGE,
    "sd35_turbo_reward": LARGE,
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_build_the_real_architecture(preset):
    config = load_config(shipped("configs") / f"{preset}.yaml")
    shape = PRESETS[preset]
    assert ("medium" in preset) == ("medium" in config.model)
    model = empty_transformer(shape)
    count = sum(parameter.numel() for parameter in model.parameters())
    chosen = dict(linears_to_quantize(model, SD3.denoiser.skip, config.quant.blocksize))
    if shape is LARGE:
        assert count == 8_056_627_520
        assert {name.split(".")[0] for name in chosen} == {"transformer_blocks"}
    assert sum(linear.weight.numel() for linear in chosen.values()) > 0.97 * count
    assert all(parameter.is_meta for parameter in model.parameters())


def plan_of(preset, pipelines, **settings):
    config = load_config(shipped("configs") / f"{preset}.yaml")
    config = make_config(config.model_dump() | settings) if settings else config
    folder = pipelines[json.dumps(PRESETS[preset])]
    dtype = devices.choose_dtype(config.compute.dtype, CPU)
    return planning.memory_plan(config, pipeline.Runtime(folder, CPU, dtype), images=20, prompts=30)


GIGABYTES = {"sd35_large_8gb": 8, "sd35_large_24gb": 24, "sd35_medium": 6, "sd35_large_paper": 24}


@pytest.mark.parametrize(("preset", "gigabytes"), GIGABYTES.items())
def test_presets_fit_what_their_header_says(pipelines, preset, gigabytes):
    plan = plan_of(preset, pipelines)
    assert plan.peak < 0.95e9 * gigabytes, plan.describe()


def test_the_plan_of_rewards_counts_the_decoder_and_the_scorer(pipelines):
    """PickScore is a CLIP with ViT-H/14: 986 million numbers in fp32, planned before it is here."""
    settings = read_yaml(shipped("configs") / "sd35_turbo_reward.yaml")
    settings["reward"] |= {"scores": ["preference:pickscore"], "second": "none"}
    config = make_config(settings)
    runtime = pipeline.Runtime(pipelines[json.dumps(LARGE)], CPU, torch.bfloat16)
    plan = planning.memory_plan(config, runtime, images=0, prompts=30)
    parts = next(phase for phase in plan.phases if phase.name == "train").parts
    assert parts["scorers"] == pytest.approx(4 * 986e6, rel=0.01)
    one = memory.vae_bytes(known_shape(config.model).vae.config, "decode", 512, 512, 512)
    assert parts["decode"] == 2 * one
    assert plan.peak < 0.95e9 * 24, plan.describe()
    guided = make_config({**settings, "reward": settings["reward"] | {"guidance": 4.5}})
    other = planning.memory_plan(guided, runtime, images=0, prompts=30)
    more = next(phase for phase in other.phases if phase.name == "train").parts
    rows = config.train.micro_batch_size
    assert more["forward"] > parts["forward"]
    assert rows == 8


def test_the_plan_counts_what_the_tensors_have(pipelines):
    """From the facts of the architecture: 8,053,694,464 weights in 4 bits less those that are
    skipped, and a scale for each 64.
    """
    plan = plan_of("sd35_large_8gb", pipelines)
    weights = next(phase for phase in plan.phases if phase.name == "train").parts["weights"]
    quantized = sum(
        linear.weight.numel()
        for _, linear in linears_to_quantize(empty_transformer(LARGE), SD3.denoiser.skip, 64)
    )
    skipped = 8_056_627_520 - quantized + 192 * 192 * 2432
    assert weights == quantized / 2 + quantized / 64 * 4 + skipped * 2


def test_a_device_that_is_too_small_is_told_what_to_change(pipelines, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 7.5e9)
    plan = plan_of("sd35_large_24gb", pipelines)
    assert not plan.fits
    assert plan.changes
    changed = {key: value for key, _, value in (change.partition("=") for change in plan.changes)}
    assert "TOO LITTLE" in plan.describe()
    assert all(f"{key}={value}" in plan.describe() for key, value in changed.items())
    # What it says is true: with those settings it fits.
    from qzo_diffusion.config.defaults import set_dotted
    from qzo_diffusion.config.files import parse_override

    settings = load_config(shipped("configs") / "sd35_large_24gb.yaml").model_dump()
    for change in plan.changes:
        set_dotted(settings, *parse_override(change))
    config = make_config(settings)
    folder = pipelines[json.dumps(LARGE)]
    again = planning.memory_plan(
        config, pipeline.Runtime(folder, CPU, torch.bfloat16), images=20, prompts=30
    )
    assert again.fits
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1e9)
    assert "no setting makes it fit" in plan_of("sd35_large_24gb", pipelines).describe()


@pytest.mark.parametrize(
    ("gigabytes", "rows"), [(5.0, 1), (7.0, 2), (8.0, 4), (12.0, 16), (1000.0, 32), (None, 32)]
)
def test_a_gpu_gets_as_many_probes_in_a_forward_as_fit(pipelines, monkeypatch, gigabytes, rows):
    monkeypatch.setattr(
        memory, "available_bytes", lambda device: None if gigabytes is None else gigabytes * 1e9
    )
    config = make_config({"model": "large", "data": {"resolution": 1024}})
    place = pipeline.Runtime(pipelines[json.dumps(LARGE)], torch.device("cuda"), torch.bfloat16)
    assert planning.fitting_micro_batch(config, place) == rows
    # or the plan looks for settings that fit
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)

    def training(count):
        tried = make_config(
            {"model": "large", "data": {"resolution": 1024}, "train": {"micro_batch_size": count}}
        )
        return next(
            phase.total
            for phase in planning.memory_plan(tried, place).phases
            if phase.name == "train"
        )

    assert gigabytes is None or rows == 1 or training(rows) <= gigabytes * 1e9
    assert gigabytes is None or rows == 32 or training(2 * rows) > gigabytes * 1e9


@pytest.mark.parametrize(
    ("gigabytes", "count"), [(1.0, 1), (7.2, 2), (9.0, 4), (12.0, 8), (None, 8)]
)
def test_a_gpu_draws_as_many_pictures_together_as_fit(pipelines, monkeypatch, gigabytes, count):
    monkeypatch.setattr(
        memory, "available_bytes", lambda device: None if gigabytes is None else gigabytes * 1e9
    )
    place = pipeline.Runtime(pipelines[json.dumps(LARGE)], torch.device("cuda"), torch.bfloat16)

    def resolved(**sample):
        config = make_config(
            {"model": "large", "data": {"resolution": 1024}, "sample": sample}
            | {"train": {"micro_batch_size": 1}}
        )
        planning.resolve_drawn_(config, place, 30)
        return config

    config = resolved()
    assert config.sample.batch_size == count
    assert resolved(batch_size=5).sample.batch_size == 5
    if gigabytes != 1.0:  # no setting makes it fit
        assert planning.memory_plan(config, place, images=20, prompts=30).fits


@pytest.mark.parametrize(("side", "rows"), [(256, 4), (512, 2), (1024, 2)])
def test_a_cpu_gets_no_more_than_its_caches_bear(pipelines, monkeypatch, side, rows):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1e12)
    place = pipeline.Runtime(pipelines[json.dumps(LARGE)], CPU, torch.bfloat16)
    assert planning.fitting_micro_batch(make_config({"data": {"resolution": side}}), place) == rows


@pytest.mark.parametrize(
    ("width", "tokens", "dtype", "rows"),
    [
        (256, 16, torch.float32, 64),  # what 4 MB hold
        (256, 16, torch.bfloat16, 128),
        (1024, 256, torch.float32, 16),
        (1024, 256, torch.bfloat16, 16),
        (1024, 512, torch.float32, 8),  # 2^24 numbers
    ],
)
def test_small_models_fill_a_cache_and_large_ones_share_their_weights(width, tokens, dtype, rows):
    assert planning.rows_on_cpu(width, tokens, dtype) == rows


@pytest.mark.parametrize(
    ("key", "small", "large"),
    [
        ("data.resolution", 256, 1024),
        ("train.micro_batch_size", 1, 8),
        ("train.optimizer", "sgd", "adam"),
        ("compute.dtype", "bfloat16", "float32"),
    ],
)
def test_what_costs_memory_is_in_the_plan(pipelines, key, small, large):
    section, _, name = key.partition(".")
    totals = []
    for value in (small, large):
        config = load_config(shipped("configs") / "sd35_large_paper.yaml").model_dump()
        config[section][name] = value
        plan = plan_of("sd35_large_paper", pipelines, **config)
        totals.append(next(phase.total for phase in plan.phases if phase.name == "train"))
    assert totals[1] > 1.01 * totals[0]


@pytest.mark.parametrize("method", ["qzo", "fo-scales"])
def test_states_of_few_bits_are_in_the_plan(pipelines, method):
    """Dense scales: two moments of 4 bytes become two of 3/8, with 8 bytes for 128 numbers."""
    numbers = []
    for bits in (32, 3):
        config = load_config(shipped("configs") / "sd35_large_paper.yaml").model_dump()
        config["method"] = method
        config["train"] |= {"optimizer": "adam", "state_bits": bits}
        plan = plan_of("sd35_large_paper", pipelines, **config)
        (train,) = (phase for phase in plan.phases if phase.name == "train")
        numbers.append(train.parts["trained numbers"])
    assert numbers[1] / numbers[0] == pytest.approx((3 / 8 + 8 / 128) / 4)


def test_a_dry_run_prints_the_plan_and_loads_nothing(train_arguments, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "load_base", lambda *args: pytest.fail("loaded"))
    assert main(train_arguments("--dry-run")) == 0
    text = capsys.readouterr().out
    for word in ("memory", "encode", "images", "load", "train", "sample", "enough"):
        assert word in text


def test_doctor_prints_the_plan(capsys, monkeypatch):
    # with a GPU it misses the weights of the large model
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory_plan"]["fits"] is True


def test_doctor_plans_as_many_probes_at_once_as_a_run_does(pipelines, monkeypatch):
    """All 32 of a step in one forward would not fit."""
    monkeypatch.setattr(hub, "cached_snapshot", lambda name: pipelines[json.dumps(LARGE)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 16e9)
    facts = doctor.examine()
    assert facts["memory_plan"]["fits"] is True
    assert facts["problems"] == []
    monkeypatch.setattr(memory, "available_bytes", lambda device: 6e9)
    monkeypatch.setattr(choosing, "least_memory", lambda folder, device: 5e9)
    assert any(
        "train --preset sd35_large_8gb" in problem for problem in doctor.examine()["problems"]
    )


def test_the_download_of_a_gated_model_leaves_out_what_is_there_twice():
    words = shlex.split(hub.download_command(hub.BIG_MODEL))
    assert words[:3] == ["hf", "download", hub.BIG_MODEL]
    flags, patterns = words[3::2], words[4::2]
    assert set(flags) == {"--exclude"}  # each with one pattern: hf takes one a flag
    left_out = {
        name: any(fnmatch(name, pattern) for pattern in patterns) for name in TWICE | WANTED
    }
    assert {name for name, out in left_out.items() if out} == TWICE
    assert hub.download_command("org/name") == "hf download org/name"


@pytest.mark.parametrize(("gigabytes", "chosen"), [(30, "large"), (3, "tiny")])
def test_auto_takes_the_large_model_where_it_fits(pipelines, monkeypatch, gigabytes, chosen):
    folder = pipelines[json.dumps(LARGE)]
    monkeypatch.setattr(hub, "cached_snapshot", lambda name: folder)
    monkeypatch.setattr(memory, "available_bytes", lambda device: gigabytes * 1e9)
    found, why = choose_model("auto")
    assert found == (folder if chosen == "large" else tiny_model())
    assert ("found in the local cache" in why) == (chosen == "large")
    if chosen == "tiny":
        assert "GB of memory at the least" in why


def test_auto_with_a_gpu_and_no_weights_says_both_commands(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(hub, "cached_snapshot", lambda name: None)
    with pytest.raises(ModelError, match=r"(?s)hf download.*--model tiny"):
        choose_model("auto")


def test_a_gated_model_that_is_not_here_says_every_step(capsys, monkeypatch, images):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    usage = shutil.disk_usage(Path.home())
    monkeypatch.setattr(
        "qzo_diffusion.system.files.shutil.disk_usage",
        lambda path: usage._replace(free=math.floor(5e9)),
    )
    code = main(
        ["train", "--style-dir", str(images), "--model", "stabilityai/stable-diffusion-3.5-large"]
    )
    error = failing(capsys, code)
    for words in (
        "accept the licence",
        "hf auth login",
        "hf download",
        "5 GB are free",
        "without network",
    ):
        assert words in error


@pytest.mark.parametrize("preset", ["sd35_large_8gb", "sd35_medium", "sd35_large_24gb"])
def test_a_gated_model_is_planned_before_its_weights_are_here(
    capsys, monkeypatch, images, tmp_path, preset
):
    monkeypatch.setattr(hub, "cached_snapshot", lambda name, file="model_index.json": None)
    command = ["train", "--style-dir", str(images), "--preset", preset]
    assert main([*command, "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert "weights are not here; planned from its known shape" in printed.err
    assert "memory    phase" in printed.out
    assert main([*command, "--output-dir", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "config"), [("large", LARGE), ("medium", MEDIUM)])
def test_the_plan_by_the_known_shape_is_that_of_the_files(pipelines, name, config):
    settings = load_config(shipped("configs") / f"sd35_{name}{'_8gb' * (name == 'large')}.yaml")
    place = pipeline.Runtime(pipelines[json.dumps(config)], torch.device("cpu"), torch.bfloat16)
    known = replace(place, shape=known_shape(f"stabilityai/stable-diffusion-3.5-{name}"))
    plans = [planning.memory_plan(settings, one, 10, 4).facts() for one in (place, known)]
    assert plans[0] == plans[1]


def test_the_known_shape_is_that_of_the_published_model():
    """Sizes as Stability AI states them; the scales follow from blocks of 64."""
    found = known_shape("stabilityai/stable-diffusion-3.5-large")
    transformer = empty_transformer(found.transformer.config)
    assert sum(one.numel() for one in transformer.parameters()) == 8_056_627_520
    assert found.native_resolution == 1024
    gigabytes = {name: part.nbytes / 2**30 for name, part in found.encoders.items()}
    assert gigabytes == pytest.approx(
        {"text_encoder": 0.23, "text_encoder_2": 1.29, "text_encoder_3": 8.9}, rel=0.02
    )
    assert found.vae.nbytes / 2**30 == pytest.approx(0.16, rel=0.03)
    assert known_shape("someone/else") is None
