"""Damaged language models and mistakes in settings, each with a message."""

import contextlib
import json
import shutil

import pytest
import torch

from qzo_diffusion.cli import main
from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.llm.causal_lm import load_causal_lm
from tests.conftest import failing
from tests.quant.stored_formats import convert_folder
from tests.runs.llm.short_run import EACH_CODE
from tests.tiny_llama import save_tiny_llama

DAMAGES = {
    "model.safetensors": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "config.json": lambda file: file.write_text('{"model_type": "llama", "hidden_size": "x"}'),
    "tokenizer.json": lambda file: file.write_text('{"a": 1}'),
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("more", [["--method", "mezo"], ["quant.type=int8"], ["--method", "qzo"]])
def test_a_damaged_file_is_told(arguments, tmp_path, model, capsys, name, more):
    shutil.copytree(model, tmp_path / "model")
    DAMAGES[name](tmp_path / "model" / name)
    assert str(tmp_path / "model") in failing(
        capsys, main(arguments("--model", tmp_path / "model", *more))
    )


@pytest.mark.parametrize("kind", ["gptq", "aqlm", "hqq"])
def test_damaged_codes_are_told(arguments, tmp_path, model, capsys, kind):
    convert_folder(model, tmp_path / "stored", kind)
    DAMAGES["model.safetensors"](tmp_path / "stored" / "model.safetensors")
    assert "where its header speaks of" in failing(
        capsys, main(arguments("--model", tmp_path / "stored"))
    )


def test_a_config_that_is_no_object_is_told(arguments, tmp_path, model, capsys):
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("[1]")
    assert "it holds a list" in failing(capsys, main(arguments("--model", tmp_path / "model")))


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_code_in_a_model_folder_is_never_run(tmp_path, model, monkeypatch, kind, stored):
    """Nor is anybody asked, who might say yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    if stored:
        shutil.rmtree(folder)
        convert_folder(model, folder, "gptq")
    file, maps = {
        "model": ("config.json", {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}),
        "tokenizer": ("tokenizer_config.json", {"AutoTokenizer": [None, "evil.Evil"]}),
    }[kind]
    changes = {"model_type": "evil"} if kind == "model" else {"tokenizer_class": "Evil"}
    (folder / file).write_text(
        json.dumps(json.loads((folder / file).read_text()) | changes | {"auto_map": maps})
    )
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with contextlib.suppress(ModelError):
        load_causal_lm(folder, torch.float32)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("more", "wrong"),
    [
        (["--task", "nonsense"], "no task 'nonsense'"),
        (["--model", "/nowhere"], "neither a folder nor a model"),
        (["--data-dir", "/nowhere"], "'/nowhere' is neither a folder nor a dataset"),
        (["data.train_file=other.tsv"], "other.tsv"),
        (["--objective", "f1"], "objective f1 for the task sst2"),
        (["--method", "qlora", "--objective", "accuracy"], "have no gradient"),
        (["--method", "mezo", "qzo.units=relative"], "which trains no scales"),
        (["--method", "quzo", "quant.type=nf4"], "with backend: intgrid"),
        (["--method", "quzo", "qzo.parametrization=dense"], "which trains integer codes"),
        (["--method", "quzo", "quant.backend=bnb"], "which trains integer codes"),
        ([*EACH_CODE, "train.optimizer=adam"], "move in whole steps"),
        ([*EACH_CODE, "quant.type=fp8", "qzo.probe=float"], "int8 or int4 codes"),
        (["qzo.parametrization=codes", "quant.backend=intgrid", "quant.type=int8"], "method: quzo"),
        (["qzo.parametrization=codes"], "needs quant.backend: intgrid"),
        (["train.optimizer=feedback"], "is for qzo.parametrization: codes"),
        (["train.state_bits=8"], "sgd remembers nothing"),
        (["train.state_bits=5", "train.optimizer=adam"], "train.state_bits"),
        (["quant.activations=int8"], "activations: float"),
        (["--method", "speed"], "method"),
        (["data.max_tokens=3"], "data.max_tokens"),
        (["qzo.layers=[nothing]"], "no such layer"),
        (["data.style_dir=x"], "unknown setting"),
        (["quant.blocksize=4096"], "no linear layer"),
    ],
)
def test_what_a_person_gets_wrong_is_told(arguments, tmp_path, capsys, more, wrong):
    assert wrong in failing(capsys, main(arguments(*more)))


def test_a_run_is_not_continued_with_other_examples(arguments, tmp_path, capsys):
    assert main(arguments("--max-steps", 1)) == 0
    error = failing(capsys, main(arguments("--resume", tmp_path / "run", "data.split_seed=1")))
    assert "data.split_seed: 0 -> 1" in error
    assert "other split" in error


def test_a_journal_is_not_replayed_over_another_model(arguments, tmp_path, capsys):
    assert main(arguments("--max-steps", 1)) == 0
    other = save_tiny_llama(tmp_path / "other", seed=1)
    journal = ["replay", "--journal", str(tmp_path / "run" / "journal.qzo"), "--model", str(other)]
    assert "a journal with codes" in failing(
        capsys, main([*journal, "--output-dir", str(tmp_path / "again")])
    )


def test_a_folder_without_weights_is_told(tmp_path, data, capsys):
    (tmp_path / "config.json").write_text("{}")
    code = main(["llm", "evaluate", "--model", str(tmp_path), "--data-dir", str(data)])
    assert "without weights and a tokenizer" in failing(capsys, code)
