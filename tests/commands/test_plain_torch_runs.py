"""Whole runs on the formats of plain torch: trained, exported for plain diffusers, replayed."""

import pytest
import torch

from qzo_diffusion.cli import main
from qzo_diffusion.config.files import make_config, read_yaml
from qzo_diffusion.core.merge import merge_changes_
from qzo_diffusion.runs.style import pipeline
from qzo_diffusion.runs.tuned import load_scales
from tests.small_models import sd3_inputs

pytestmark = pytest.mark.usefixtures("small_tiny")

QUANTIZERS = {
    "bof4s": ["quant.type=bof4s"],
    "svdquant": ["quant.type=svdquant", "data.resolution=96"],
    "w4a4": ["quant.type=svdquant", "quant.activations=int4"],
}


@pytest.fixture(scope="module", params=QUANTIZERS)
def trained(request, train_squares):
    return train_squares(request.param, "red apple", *QUANTIZERS[request.param])


def test_a_run_moves_scales_and_keeps_their_signs(trained):
    config = make_config(read_yaml(trained / "config.yaml"))
    assert config.quant.backend == "reference"
    _, scales, _ = pipeline.load_base(config, pipeline.find_runtime(config))
    tuned = load_scales(trained)[0]
    assert tuned.keys() == scales.tensors().keys()
    assert any(not torch.equal(tuned[name], scales[name]) for name in scales)
    assert all(torch.equal(tuned[name].sign(), scales[name].sign()) for name in scales)
    if config.quant.type == "svdquant":
        gains = [name for name in scales if name.endswith(".down")]
        assert any(not torch.equal(tuned[name], scales[name]) for name in gains)
    else:
        assert any((scales[name] < 0).any() for name in scales)


def test_plain_diffusers_computes_what_the_run_does(export, trained):
    from diffusers import SD3Transformer2DModel

    settings = read_yaml(trained / "config.yaml")
    settings["quant"]["activations"] = "float"  # a plain weight has no rounded inputs
    config = make_config(settings)
    model, scales, _ = pipeline.load_base(config, pipeline.find_runtime(config))
    merge_changes_(scales, [(load_scales(trained)[0], 1.0)])
    plain = SD3Transformer2DModel.from_pretrained(export("bf16", run=trained)).float().eval()
    x = sd3_inputs(plain)
    with torch.no_grad():
        wanted, got = model.float()(**x).sample, plain(**x).sample
    assert (got - wanted).norm() < 0.02 * wanted.norm()


def test_changes_and_journals_give_the_same_scales(export, trained, tmp_path):
    tuned = load_scales(trained)[0]
    assert export("delta", run=trained).is_dir()
    again = load_scales(export("delta", run=tmp_path / "out", name="again"))[0]
    assert again.keys() == load_scales(tmp_path / "out")[0].keys()
    replay = ["replay", "--journal", trained / "journal.qzo", "--output-dir", tmp_path / "replayed"]
    assert main([str(word) for word in replay]) == 0
    replayed = load_scales(tmp_path / "replayed")[0]
    assert all(torch.equal(tuned[name], replayed[name]) for name in tuned)


def test_its_own_layout_is_refused(trained, tmp_path, capsys):
    words = ["export", "--run", trained, "--format", "native", "--output-dir", tmp_path / "out"]
    assert main([str(word) for word in words]) == 2
    assert "export as bf16" in capsys.readouterr().err
