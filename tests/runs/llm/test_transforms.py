"""Runs on models whose layers' inputs are mapped: trained, resumed, replayed, or refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from qzo_diffusion.cli import main
from qzo_diffusion.config.files import make_config
from qzo_diffusion.config.llm import LlmConfig
from qzo_diffusion.core.errors import OutputError
from qzo_diffusion.core.journal import read_journal
from qzo_diffusion.llm import calibration, flatquant, kurtail
from qzo_diffusion.llm.decoder import Decoder
from qzo_diffusion.quant.stream import Quantization
from qzo_diffusion.runs.llm.methods import load_base
from qzo_diffusion.runs.llm.transforms import Maps
from tests.conftest import failing, killed_after
from tests.quant.stored_formats import convert_folder
from tests.runs.llm.short_run import SECOND_BLOCK, assert_same_weights

W4A4 = ["quant.backend=intgrid", "quant.type=int4", "quant.activations=int4"]
HADAMARD = "quant.transform=hadamard"
IDS = torch.arange(30).view(2, 15)


@pytest.fixture
def learning(tmp_path, monkeypatch):
    """Settings of maps that are learned in a moment, with a cache of their own."""
    monkeypatch.setattr(calibration, "WINDOW", 32)
    monkeypatch.setattr(kurtail, "STEPS", 3)
    monkeypatch.setattr(flatquant, "STEPS", 3)
    text = tmp_path / "text.txt"
    text.write_text("It was a great film, and a terrible answer. " * 30)
    return [f"quant.calibration={text}", f"data.cache_dir={tmp_path / 'cache'}"]


@pytest.mark.parametrize("kind", ["kurtail", pytest.param("flatquant", marks=pytest.mark.slow)])
def test_a_run_takes_what_it_learned_along(
    arguments, tmp_path, monkeypatch, capsys, learning, kind
):
    """Without the text and the cache it goes on, is replayed and evaluated by its own folder."""
    more = [f"quant.transform={kind}", "--max-steps", 4, *W4A4, *learning]
    assert main(arguments(*more, "--json", name="whole")) == 0
    ended = json.loads(capsys.readouterr().out)["accuracy"]["end"]
    with monkeypatch.context() as patched:
        killed_after(patched, 3)
        assert main(arguments(*more, name="killed")) == 130
    (tmp_path / "text.txt").unlink()
    shutil.rmtree(tmp_path / "cache")
    assert main(arguments("--resume", tmp_path / "killed", *more, name="killed")) == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")
    journal = ["--journal", str(tmp_path / "whole" / "journal.qzo")]
    assert main(["replay", *journal, "--output-dir", str(tmp_path / "again")]) == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "again")
    capsys.readouterr()
    assert main(["llm", "evaluate", "--run", str(tmp_path / "again"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == ended


@pytest.mark.parametrize("kind", ["kurtail", "flatquant"])
def test_a_file_of_other_maps_is_refused(tmp_path, kind):
    save_file({"other": torch.ones(2)}, tmp_path / "transform.safetensors")
    maps = Maps(kind, Quantization(), tmp_path, tmp_path, cache=tmp_path, run=tmp_path)
    with pytest.raises(OutputError, match=r"transform\.safetensors without"):
        maps.of(Decoder(1, 8, 8, 4, 2, 2, tied=True))


@pytest.mark.parametrize("kind", ["kurtail", "flatquant"])
def test_maps_are_learned_once(tmp_path, model, monkeypatch, learning, kind):
    quant = {"transform": kind, "calibration": str(tmp_path / "text.txt")}
    first = base_of(model, tmp_path, **quant)
    with monkeypatch.context() as patched:
        patched.setattr(kurtail, "learned", None)
        patched.setattr(flatquant, "learned", None)
        again = base_of(model, tmp_path, **quant)
    assert first.codes == again.codes
    (tmp_path / "text.txt").write_text("a good and a bad film, " * 60)
    assert base_of(model, tmp_path, **quant).codes != first.codes


@pytest.mark.parametrize(
    ("more", "wrong"),
    [
        (["quant.transform=kurtail"], "calibration: a text file"),
        (["quant.transform=kurtail", "quant.calibration=no.txt"], "no.txt can't be read"),
    ],
)
def test_a_text_that_is_missing_is_told(arguments, tmp_path, capsys, more, wrong):
    assert wrong in failing(capsys, main(arguments(f"data.cache_dir={tmp_path}", *more)))


def base_of(model, cache=None, **quant):
    data = {"cache_dir": None if cache is None else str(cache)}
    config = make_config({"model": str(model), "quant": quant, "data": data}, LlmConfig)
    return load_base(config, model, torch.device("cpu"), torch.float32)


def logits(model, **quant):
    with torch.no_grad():
        return base_of(model, **quant).lm.model(input_ids=IDS).logits


@pytest.mark.parametrize(
    "more",
    [
        W4A4,
        pytest.param([], marks=pytest.mark.slow),
        pytest.param(["quant.type=svdquant", "quant.activations=int4"], marks=pytest.mark.slow),
    ],
)
def test_a_run_is_resumed_replayed_and_evaluated_bit_for_bit(
    arguments, tmp_path, monkeypatch, capsys, more
):
    more = [HADAMARD, SECOND_BLOCK, "--max-steps", 4, *more]
    assert main(arguments(*more, "--json", name="whole")) == 0
    ended = json.loads(capsys.readouterr().out)["accuracy"]["end"]
    with monkeypatch.context() as patched:
        killed_after(patched, 3)
        assert main(arguments(*more, name="killed")) == 130
    assert main(arguments("--resume", tmp_path / "killed", *more, name="killed")) == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")
    journal = tmp_path / "whole" / "journal.qzo"
    assert read_journal(journal).header["quant"]["transform"] == "hadamard"
    again = ["replay", "--journal", str(journal), "--output-dir", str(tmp_path / "again")]
    assert main(again) == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "again")
    capsys.readouterr()
    assert main(["llm", "evaluate", "--run", str(tmp_path / "again"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == ended


@pytest.mark.parametrize("method", ["quzo", "fo-scales"])
def test_other_methods_train_rotated_models(arguments, tmp_path, method):
    assert main(arguments(HADAMARD, "--method", method, "--max-steps", 2)) == 0
    assert main(["llm", "evaluate", "--run", str(tmp_path / "run")]) == 0


def test_codes_are_those_of_other_weights_and_the_outputs_alike(model):
    eight_bits = {"backend": "intgrid", "type": "int8"}
    plain = base_of(model, **eight_bits)
    rotated = base_of(model, **eight_bits, transform="hadamard")
    assert plain.codes != rotated.codes
    assert plain.scales.tensors().keys() == rotated.scales.tensors().keys()
    wanted, got = logits(model, **eight_bits), logits(model, **eight_bits, transform="hadamard")
    assert (got - wanted).norm() < 0.05 * wanted.norm()


def test_a_rotated_run_can_not_be_exported(arguments, tmp_path, capsys):
    assert main(arguments(HADAMARD, "--max-steps", 1)) == 0
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    code = main(["export", "--run", run, "--format", "native", "--output-dir", out])
    assert "no other program applies the maps" in failing(capsys, code)


@pytest.mark.parametrize(
    ("more", "wrong"),
    [
        (["--method", "mezo"], "quant.transform: none"),
        (["--method", "qlora"], "quant.transform: none"),
        (["quant.type=int8"], "backend: intgrid"),
    ],
)
def test_where_nothing_can_be_mapped_it_is_told(arguments, capsys, more, wrong):
    assert wrong in failing(capsys, main(arguments(HADAMARD, *more)))


def test_codes_on_disk_can_not_be_mapped(arguments, tmp_path, model, capsys):
    convert_folder(model, tmp_path / "stored", "gptq")
    said = failing(capsys, main(arguments(HADAMARD, "--model", tmp_path / "stored")))
    assert "codes can't be mapped" in said
