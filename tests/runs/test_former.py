"""A run on former weights of the embedded model is refused, with the commit to use."""

import shutil

import pytest
import yaml
from safetensors.torch import load_file, save_file

from qzo_diffusion.cli import main
from qzo_diffusion.config.files import make_config
from qzo_diffusion.runs import build, former
from qzo_diffusion.runs.style import pipeline
from qzo_diffusion.runs.tuned import load_scales
from tests.conftest import failing
from tests.runs.short_run import replay
from tests.small_pipeline import write_pipeline


def codes_of_tiny():
    config = make_config({"model": "tiny", "compute": {"device": "cpu", "dtype": "float32"}})
    model, scales, _ = pipeline.load_base(config, pipeline.find_runtime(config))
    return build.fingerprints(model, scales)[0]


def test_the_default_quantization_of_the_shipped_weights_is_known():
    """Once it is not, the weights changed: add a row for the new ones, and put the last commit with
    the old ones in the place of the one that stands for them.
    """
    assert former.former_commit(codes_of_tiny())


@pytest.mark.parametrize(
    ("codes", "here", "refused"),
    [
        ("old", "new", True),
        ("old", "old in other blocks", False),
        ("never seen", "new", False),
        (None, "new", False),
    ],
)
def test_only_former_weights_name_a_commit(monkeypatch, codes, here, refused):
    monkeypatch.setattr(former, "FORMER", {"abc1234": ("old", "old in other blocks")})
    remedy = former.remedy_for(codes, here)
    assert ("abc1234" in remedy) if refused else remedy is None


@pytest.fixture
def changed_weights(whole, tmp_path, monkeypatch):
    """A copy of a run whose base has other weights now; the old codes are in the table."""
    run = shutil.copytree(whole, tmp_path / "run")
    monkeypatch.setattr(former, "FORMER", {"abc1234": (load_scales(run)[1]["qzo.codes"],)})
    changed = write_pipeline(tmp_path / "changed")
    change_(changed)
    settings = run / "config.yaml"
    said = yaml.safe_load(settings.read_text()) | {"model": str(changed)}
    settings.write_text(yaml.safe_dump(said))
    return run


def change_(folder):
    file = next((folder / "transformer").glob("*.safetensors"))
    save_file({name: tensor.flip(0) for name, tensor in load_file(file).items()}, file)


def test_every_verb_that_applies_a_run_names_the_commit(changed_weights, tmp_path, capsys):
    run, out = changed_weights, str(tmp_path / "mix")
    assert "git checkout abc1234" in failing(
        capsys, main(["mix", "--run", f"{run}=1", "--output-dir", out])
    )
    code, _ = replay(tmp_path, run, "--model", tmp_path / "changed")
    assert "git checkout abc1234" in failing(capsys, code)
