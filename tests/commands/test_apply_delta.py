"""A delta on a plain 4-bit pipeline of diffusers, against `sample --run`."""

import pytest
import torch
from PIL import Image

from qzo_diffusion.api import apply_delta
from qzo_diffusion.config.files import load_config
from qzo_diffusion.core.errors import ConfigError, ModelError, OutputError
from qzo_diffusion.diffusion.prompts import parse_prompts
from qzo_diffusion.quant.load import find_scales
from qzo_diffusion.runs.style import pipeline as style_pipeline
from tests.commands.plain_nf4 import plain_nf4
from tests.commands.short_runs import sampled
from tests.small_models import sd3_inputs

pytestmark = pytest.mark.usefixtures("small_tiny")
STEPS = 4


@pytest.fixture
def pipe(pipeline, finished, monkeypatch):
    return plain_nf4(pipeline, load_config(finished / "config.yaml"), monkeypatch)


def drawn(run, transformer):
    """The picture of a banana that this transformer draws with the run's settings."""
    config = load_config(run / "config.yaml")
    config.sample.steps = STEPS
    runtime = style_pipeline.find_runtime(config)
    prompts = parse_prompts([("here", "banana")], None)
    encoded = style_pipeline.prompt_encoder(
        config, runtime.folder, runtime.device, runtime.dtype
    ).encode([*prompts.texts, config.sample.negative_prompt])
    vae = style_pipeline.load_vae(config, runtime.folder, runtime.device)
    sampler = style_pipeline.sampler(config, runtime, transformer, vae, prompts.prompts, encoded)
    return sampler.images()[0].tobytes()


@torch.no_grad()
def prediction(pipe):
    return pipe.transformer(**sd3_inputs(pipe.transformer)).sample


@pytest.mark.parametrize(
    ("strength", "between"), [(1.0, None), (0.5, None), (1.0, (0.0, 0.9)), (0.5, (0.5, 1.0))]
)
def test_pictures_are_those_of_sample(pipe, finished, export, tmp_path, strength, between):
    delta = export("delta")
    apply_delta(pipe, delta, 0.0)  # from here on no forward on a CPU repacks a layer
    base = drawn(finished, pipe.transformer)
    apply_delta(pipe, delta, strength, between)
    flags = ["--strength", strength, "--steps", STEPS]
    flags += [] if between is None else ["--tuned-between", *between]
    sampled(tmp_path, finished, "sampled", *map(str, flags))
    wanted = Image.open(tmp_path / "sampled" / "samples" / "000.png").tobytes()
    assert drawn(finished, pipe.transformer) == wanted
    assert wanted != base


def test_strengths_count_from_the_base_whatever_was_applied_before(pipe, finished):
    scales = find_scales(pipe.transformer)
    of_base = {name: scales[name].clone() for name in scales}
    apply_delta(pipe, finished, 1.0)
    tuned = prediction(pipe)
    apply_delta(pipe, str(finished / "final" / "scales.safetensors"), 0.5, between=(0.0, 0.05))
    apply_delta(pipe, finished, 1.0)
    assert torch.equal(prediction(pipe), tuned)
    apply_delta(pipe, finished, 0.0)
    assert not torch.equal(tuned, prediction(pipe))
    scales = find_scales(pipe.transformer)
    assert all(torch.equal(scales[name], of_base[name]) for name in of_base)


def test_another_models_delta_leaves_the_pipeline_as_it_was(pipe, finished, coarse):
    apply_delta(pipe, finished, 0.5)
    before = prediction(pipe)
    with pytest.raises(ModelError, match="over other codes"):
        apply_delta(pipe, coarse)
    assert torch.equal(prediction(pipe), before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_a_step_leaves_the_scales(pipe, finished, monkeypatch, error):
    apply_delta(pipe, finished, 1.0, between=(0.0, 0.5))
    model = pipe.transformer.transformer
    before = {name: find_scales(model)[name].clone() for name in find_scales(model)}

    def fails(*args, **options):
        raise error

    monkeypatch.setattr(model.proj_out, "forward", fails)
    inputs = sd3_inputs(model) | {"timestep": torch.tensor([700.0, 700.0])}
    with pytest.raises(error), torch.no_grad():
        pipe.transformer(**inputs)
    scales = find_scales(model)
    assert all(torch.equal(scales[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"strength": float("nan")}, "strength=nan"),
        ({"between": (0.7, 0.2)}, "between="),
        ({"between": (0.0, 7.0)}, "between="),
        ({"between": (0.5,)}, "between="),
    ],
)
def test_numbers_that_can_not_be_are_refused(pipe, finished, arguments, words):
    with pytest.raises(ConfigError, match=words):
        apply_delta(pipe, finished, **arguments)


def test_a_pipeline_or_a_file_that_is_none_is_refused(pipe, tmp_path, finished):
    with pytest.raises(ModelError, match="without a transformer"):
        apply_delta(object(), finished)
    with pytest.raises(OutputError):
        apply_delta(pipe, tmp_path)
