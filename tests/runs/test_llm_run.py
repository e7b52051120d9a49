"""Whole runs of `qzo-diffuse llm` on a tiny Llama: every method, resumed bit for bit, and what a
person does wrong.
"""

import contextlib
import functools
import io
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qzo_diffusion.cli import main
from qzo_diffusion.config.files import load_config, make_config, read_yaml
from qzo_diffusion.config.llm import LlmConfig
from qzo_diffusion.core.errors import ConfigError, ModelError
from qzo_diffusion.core.journal import read_journal
from qzo_diffusion.llm.causal_lm import load_causal_lm
from qzo_diffusion.quant.load import find_scales, quantize_
from qzo_diffusion.runs.llm.methods import apply_, load_base
from qzo_diffusion.runs.llm.plan import make_plan
from qzo_diffusion.runs.tuned import load_scales
from tests.conftest import failing, killed_after, metrics
from tests.quant.stored_formats import convert_folder
from tests.tiny_llama import save_tiny_llama, write_sentences

METHODS = ["qzo", "mezo", "quzo", "quzo-lora", "qlora", "fo-scales"]
STEPS = 6
EACH_STEP = ["train.checkpoint_every=1"]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_sentences(tmp_path_factory.mktemp("sentences"))


def command_line(output_dir, model, data, *more):
    """The command line of a short run."""
    base = ["llm", "train", "--task", "sst2", "--data-dir", data, "--output-dir", output_dir]
    base += [] if "--model" in more else ["--model", model]
    base += [] if "--max-steps" in more else ["--max-steps", STEPS]
    small = ["data.batch_size=4", "data.train_examples=16", "data.validation_examples=8"]
    rest = ["train.validate_every=2", "train.checkpoint_every=2", "compute.dtype=float32"]
    return [str(part) for part in [*base, *small, *rest, *more]]


@pytest.fixture
def arguments(tmp_path, model, data):
    """The command line of a short run into `tmp_path/<name>`."""
    return lambda *more, name="run": command_line(tmp_path / name, model, data, *more)


def assert_same_weights(first, second):
    one, other = (load_file(folder / "final" / "scales.safetensors") for folder in (first, second))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@dataclass
class Ended:
    """A run that is over: its folder, its results and what it said. Tests only read it."""

    folder: Path
    results: dict
    said: str


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model, data):
    """The run of a method, made at the first call."""
    root = tmp_path_factory.mktemp("whole")

    @functools.cache
    def of(method):
        out, err = io.StringIO(), io.StringIO()
        command = command_line(root / method, model, data, "--method", method, "--json")
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            assert main(command) == 0
        return Ended(root / method, json.loads(out.getvalue()), err.getvalue())

    return of


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_a_whole_run(whole, method):
    run, results = whole(method).folder, whole(method).results
    assert results["steps"] == STEPS
    assert "warning: no report" not in whole(method).said
    assert "Accuracy on" in (run / "report.html").read_text()
    assert results["accuracy"].keys() == {"start", "end"}
    assert {
        "config.yaml",
        "environment.json",
        "dataset.json",
        "metrics.jsonl",
        "evaluation.json",
        "final",
        "checkpoints",
    } <= {path.name for path in run.iterdir()}
    assert (run / "journal.qzo").exists() == (method not in ("qlora", "fo-scales"))
    assert len(json.loads((run / "dataset.json").read_text())) == 16 + 8 + 12
    lines = metrics(run)
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 2, 4, 6]
    stored = torch.int8 if method == "quzo" else torch.float32
    assert all(
        tensor.dtype == stored
        for tensor in load_file(run / "final" / "scales.safetensors").values()
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_killed_goes_on_bit_for_bit(arguments, tmp_path, monkeypatch, whole, method):
    more = ["--method", method] + (["train.optimizer=adam"] if method == "qzo" else [])
    if method == "qzo":
        assert main(arguments(*more, name="whole")) == 0
        ended = tmp_path / "whole"
    else:
        ended = whole(method).folder
    with monkeypatch.context() as patched:
        killed_after(patched, 5)
        assert main(arguments(*more, name="killed")) == 130
    assert main(arguments("--resume", tmp_path / "killed", name="killed")) == 0
    assert_same_weights(ended, tmp_path / "killed")
    assert metrics(ended) == metrics(tmp_path / "killed")
    read = [
        json.loads((folder / "evaluation.json").read_text())
        for folder in (ended, tmp_path / "killed")
    ]
    assert read[0] == read[1]


SECOND_BLOCK = "qzo.layers=[layers.1]"  # what the first one gives is kept


def test_what_is_kept_is_made_again_on_resume_bit_for_bit(arguments, tmp_path, monkeypatch):
    assert main(arguments(SECOND_BLOCK, name="whole")) == 0
    with monkeypatch.context() as patched:
        killed_after(patched, 3)
        assert main(arguments(SECOND_BLOCK, name="killed")) == 130
    assert main(arguments("--resume", tmp_path / "killed", name="killed")) == 0
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")
    assert main(arguments(SECOND_BLOCK, "data.keep_hidden=false", name="not_kept")) == 0
    whole, other = (
        metrics(tmp_path / name)[-1]["validation_loss"] for name in ("whole", "not_kept")
    )
    assert whole == pytest.approx(other, rel=1e-3)


def test_every_example_can_have_several_directions(arguments, tmp_path):
    more = ["qzo.num_directions=3", "qzo.per_example=true", "qzo.normalize=true"]
    assert main(arguments(*more)) == 0
    steps = read_journal(tmp_path / "run" / "journal.qzo").steps
    assert {len(step.projected_grad) for step in steps} == {12}
    assert (
        main(
            [
                "replay",
                "--journal",
                str(tmp_path / "run" / "journal.qzo"),
                "--output-dir",
                str(tmp_path / "replayed"),
            ]
        )
        == 0
    )
    trained, replayed = (
        load_file(tmp_path / name / "final" / "scales.safetensors") for name in ("run", "replayed")
    )
    assert all(torch.equal(tensor, replayed[name]) for name, tensor in trained.items())


@pytest.mark.parametrize("method", ["mezo", "quzo-lora", "qlora"])
def test_what_is_trained_is_what_the_moved_model_has(model, monkeypatch, method):
    """To move a model gives its parameters new memory, also where a CPU is all there is to move
    to.
    """
    original = torch.nn.Module.to

    def to(self, *place, **options):
        for parameter in self.parameters():
            parameter.data = parameter.data.clone()
        return original(self, *place, **options)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    base = load_base(
        make_config({"method": method}, LlmConfig), model, torch.device("cpu"), torch.float32
    )
    theta = base.theta.templates()
    assert theta
    for name, number in theta.items():
        assert number.data_ptr() == base.lm.model.get_submodule(name).weight.data_ptr(), name


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss_and_evaluate_finds_the_same_model(
    arguments, tmp_path, capsys, method
):
    """Twelve sentences that are told apart by one word: a few steps at a high rate suffice for each
    method.
    """
    rate = {
        "qzo": 0.1,
        "mezo": 1e-3,
        "quzo": 1.0,
        "quzo-lora": 1e-3,
        "qlora": 1e-2,
        "fo-scales": 3e-2,
    }[method]
    assert (
        main(
            arguments(
                "--method",
                method,
                f"train.lr={rate}",
                "--max-steps",
                60 if method == "quzo-lora" else 30,
                "train.validate_every=0",
                "--json",
            )
        )
        == 0
    )
    results = json.loads(capsys.readouterr().out)
    assert results["validation_loss"]["end"] < results["validation_loss"]["start"]
    assert main(["llm", "evaluate", "--run", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == results["accuracy"]["end"]
    assert found["method"] == method
    assert (
        main(["llm", "evaluate", "--config", str(tmp_path / "run" / "config.yaml"), "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["accuracy"] == results["accuracy"]["start"]


def test_a_model_is_quantized_while_it_is_read(model, monkeypatch):
    """And is the one that is read whole and quantized then; the whole one never exists."""
    config = make_config({"model": str(model)}, LlmConfig)
    whole = load_causal_lm(model, torch.float32)
    quantize_(whole.model, skip=config.quant.skip)

    def refused(*args, **options):
        raise AssertionError("the unquantized model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refused)
    base = load_base(config, model, torch.device("cpu"), torch.float32)
    ids = torch.arange(12).view(1, -1)
    with torch.no_grad():
        assert torch.equal(base.lm.model(input_ids=ids).logits, whole.model(input_ids=ids).logits)
    assert base.lm.model.generation_config.to_dict() == whole.model.generation_config.to_dict()


def test_the_base_is_evaluated_by_name(model, data, capsys):
    assert (
        main(["llm", "evaluate", "--task", "sst2", "--model", str(model), "--data-dir", str(data)])
        == 0
    )
    assert "on 12 examples of sst2" in capsys.readouterr().err


def test_accuracy_itself_can_be_the_objective(arguments, tmp_path):
    assert main(arguments("--objective", "accuracy")) == 0
    count = len(read_journal(tmp_path / "run" / "journal.qzo").steps[0].projected_grad)
    wrong = [line["loss_plus"] * count for line in metrics(tmp_path / "run") if "loss" in line]
    assert wrong == pytest.approx([round(one) for one in wrong])  # answers are right or wrong


def test_generated_text_is_tuned_by_its_f1(tmp_path, model, capsys):
    facts = [
        {
            "title": "t",
            "context": f"film {n}",
            "question": "which",
            "answers": [" red", "green film"],
        }
        for n in range(12)
    ]
    for name in ("train.json", "dev.json"):
        (tmp_path / name).write_text(json.dumps(facts))
    base = [
        "llm",
        "train",
        "--task",
        "squad",
        "--model",
        str(model),
        "--data-dir",
        str(tmp_path),
        "--objective",
        "f1",
        "--json",
    ]
    small = [
        "--max-steps",
        "2",
        "data.batch_size=3",
        "data.validation_examples=2",
        "data.train_examples=6",
    ]
    assert main([*base, *small, "--output-dir", str(tmp_path / "run")]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["f1"]["end"] <= 1


@pytest.mark.parametrize(
    "more",
    [
        ["quant.type=int8"],
        ["quant.backend=reference", "quant.type=fp4"],
        ["compute.dtype=bfloat16"],
    ],
)
@pytest.mark.parametrize("method", ["qzo", "fo-scales"])
def test_other_quantizers_and_dtypes_are_trained_and_found_again(
    arguments, tmp_path, capsys, method, more
):
    assert main(arguments("--method", method, "--max-steps", 2, *EACH_STEP, *more, "--json")) == 0
    assert_found_again(tmp_path / "run", more, capsys)


def assert_found_again(run, settings, capsys):
    """The settings are the run's, its scales moved, and `llm evaluate` finds what it ended with."""
    ended = json.loads(capsys.readouterr().out)["accuracy"]["end"]
    resolved = read_yaml(run / "config.yaml")
    for setting in settings:
        section, name, value = re.split("[.=]", setting)
        assert resolved[section][name] == value
    first, last = (load_scales(run / f"checkpoints/step_00000{step}")[0] for step in (1, 2))
    assert any(not torch.equal(first[name], last[name]) for name in first)
    assert main(["llm", "evaluate", "--run", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == ended


@pytest.mark.parametrize(
    "more",
    [["quant.type=int4"], ["quant.type=fp8", "train.optimizer=sgd"], ["quant.activations=int8"]],
)
def test_other_grids_and_rounded_inputs_are_trained_and_found_again(
    arguments, tmp_path, capsys, more
):
    large = ["--max-steps", 3, "train.lr=1", *EACH_STEP]  # steps that no grid rounds away
    assert main(arguments("--method", "quzo", *large, *more, "--json")) == 0
    assert_found_again(tmp_path / "run", more, capsys)


def test_columns_of_a_format_without_them_are_refused(arguments, tmp_path, model, capsys):
    convert_folder(model, tmp_path / "stored", "aqlm")
    said = failing(
        capsys, main(arguments("--model", tmp_path / "stored", "qzo.parametrization=column"))
    )
    assert "one scale for each output" in said
    assert "use qzo.parametrization=separable" in said


@pytest.mark.parametrize("kind", ["gptq", "aqlm", "hqq"])
@pytest.mark.parametrize("method", ["qzo", "fo-scales"])
def test_a_folder_that_is_quantized_stays_in_its_format(arguments, tmp_path, model, kind, method):
    convert_folder(model, tmp_path / "stored", kind)
    assert (
        main(arguments("--model", tmp_path / "stored", "--method", method, "--max-steps", 3)) == 0
    )
    tuned = load_file(tmp_path / "run" / "final" / "scales.safetensors")
    part = ".scale" if kind == "hqq" else ".scales"
    assert tuned.keys() == {
        name.removesuffix(part)
        for name in load_file(tmp_path / "stored" / "model.safetensors")
        if name.endswith(part)
    }
    assert main(["llm", "evaluate", "--run", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize("kind", ["gptq", "aqlm", "hqq"])
def test_adapters_over_layers_that_peft_does_not_know_are_refused(
    arguments, tmp_path, model, capsys, kind
):
    convert_folder(model, tmp_path / "stored", kind)
    said = failing(capsys, main(arguments("--model", tmp_path / "stored", "--method", "qlora")))
    assert f"stored as {kind}" in said


@pytest.mark.parametrize("kind", ["bitsandbytes", "gptq", "aqlm", "hqq"])
def test_an_exported_model_is_the_tuned_one(arguments, tmp_path, model, capsys, kind):
    """bitsandbytes' is loaded by transformers itself; for the others no package is here, and our
    own reader has to do.
    """
    folder = model
    if kind != "bitsandbytes":
        folder = tmp_path / "stored"
        convert_folder(model, folder, kind)
    assert main(arguments("--model", folder, "train.lr=0.1")) == 0
    export = [
        "export",
        "--run",
        str(tmp_path / "run"),
        "--format",
        "native",
        "--output-dir",
        str(tmp_path / "exported"),
        "--json",
    ]
    capsys.readouterr()
    assert main(export) == 0
    told = json.loads(capsys.readouterr().out)
    assert f"pretrained={tmp_path / 'exported'}" in told["lm_eval"]
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "library_name: transformers" in card.split("---")[1]
    assert "| task | sst2 |" in card
    assert "| Accuracy on sst2 |" in card
    assert str(tmp_path) not in card
    config = load_config(tmp_path / "run" / "config.yaml", LlmConfig)
    base = load_base(config, folder, torch.device("cpu"), torch.float32)
    ids = torch.arange(12).view(1, -1)
    with torch.no_grad():
        before = base.lm.model(input_ids=ids).logits
        apply_(base, *load_scales(tmp_path / "run"), tmp_path / "run")
        tuned = base.lm.model(input_ids=ids).logits
        if kind == "bitsandbytes":
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", device_map="cpu")
            # never repacked: as it stands, its first forward on some processors would round the
            # scales
            find_scales(loaded)
        else:
            loaded = load_causal_lm(tmp_path / "exported", torch.float32).model
        found = loaded(input_ids=ids).logits
    assert not torch.equal(tuned, before)
    if kind != "bitsandbytes":
        # fp16 on disk: half a unit in the last of 11 bits of every scale, over two layers
        assert (found - tuned).abs().max() < 0.05 * (tuned - before).abs().max()
    else:
        assert torch.equal(found, tuned)


def test_only_scales_are_exported(arguments, tmp_path, capsys):
    assert main(arguments("--method", "qlora", "--max-steps", 1)) == 0
    code = main(
        [
            "export",
            "--run",
            str(tmp_path / "run"),
            "--format",
            "native",
            "--output-dir",
            str(tmp_path / "exported"),
        ]
    )
    assert "tuned by qlora" in failing(capsys, code)


def test_a_dry_run_shows_what_the_model_will_read(arguments, tmp_path, capsys):
    assert main(arguments("--dry-run", "data.batch_size=2")) == 0
    shown = capsys.readouterr().out
    assert "16 to train on, 8 held out, 12 to test on" in shown
    assert "It was" in shown
    assert "a step    2 examples, 8 directions of each: 16 forward passes" in shown
    assert "layers: quiet" in shown
    assert not (tmp_path / "run").exists()


def test_micro_batches_change_nothing_but_rounding(arguments, tmp_path):
    assert main(arguments(name="one")) == 0
    assert main(arguments("train.micro_batch_size=2", name="two")) == 0
    one, two = (
        load_file(tmp_path / name / "final" / "scales.safetensors") for name in ("one", "two")
    )
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-4, atol=0)


def test_one_file_for_both_parts_is_drawn_disjointly(arguments, tmp_path):
    files = [
        "data.train_file=train.tsv",
        "data.test_file=train.tsv",
        "data.test_examples=4",
        "data.train_examples=12",
    ]
    assert main(arguments(*files)) == 0
    rows = json.loads((tmp_path / "run" / "dataset.json").read_text())
    assert len({row["file"] for row in rows}) == len(rows) == 24


@pytest.mark.parametrize("how", ["./train.tsv", "../{}/train.tsv", "{}/train.tsv", "link.tsv"])
def test_one_file_is_one_file_however_it_is_written(model, tmp_path, how):
    data = write_sentences(tmp_path / "here")
    (data / "link.tsv").symlink_to("train.tsv")
    names = {
        "train_file": "train.tsv",
        "test_file": how.format(data.name if how.startswith("..") else data),
    }
    counts = {"train_examples": 12, "validation_examples": 8, "test_examples": 4}
    config = make_config(
        {"model": str(model), "data": {"dir": str(data), **names, **counts}}, LlmConfig
    )
    splits = make_plan(config).splits
    assert (
        len({one.prompt for part in (splits.train, splits.validation, splits.test) for one in part})
        == 24
    )


@pytest.mark.parametrize("method", ["mezo", "qlora", "quzo-lora"])
def test_methods_that_train_no_scales_take_the_chosen_layers(model, method):
    def trained(**qzo):
        config = make_config({"method": method, "qzo": qzo}, LlmConfig)
        return set(load_base(config, model, torch.device("cpu"), torch.float32).theta.templates())

    assert len(trained()) == 14 * (1 if method == "mezo" else 2)
    assert {name.split(".lora")[0] for name in trained(layers=["layers.1.mlp"])} == {
        f"model.layers.1.mlp.{kind}_proj" for kind in ("gate", "up", "down")
    }
    with pytest.raises(ConfigError, match="no such layer"):
        trained(layers=["nothing"])


@pytest.mark.parametrize("kind", ["gptq", "aqlm", "hqq"])
def test_weights_that_are_codes_are_not_trained_by_mezo(arguments, tmp_path, model, capsys, kind):
    convert_folder(model, tmp_path / "stored", kind)
    said = failing(capsys, main(arguments("--model", tmp_path / "stored", "--method", "mezo")))
    assert f"stored as {kind}" in said
    assert "give the model that it was made of" in said


def test_only_its_own_format_is_written_of_a_stored_model(arguments, tmp_path, model, capsys):
    convert_folder(model, tmp_path / "stored", "gptq")
    assert main(arguments("--model", tmp_path / "stored", "--max-steps", 1)) == 0
    export = [
        "export",
        "--run",
        str(tmp_path / "run"),
        "--output-dir",
        str(tmp_path / "exported"),
        "--format",
    ]
    said = failing(capsys, main([*export, "nf4"]))
    assert "over a model in gptq" in said
    assert "use --format native" in said


def test_what_has_no_folder_is_not_sent_in_a_circle(arguments, tmp_path, capsys):
    assert main(arguments("quant.type=int8", "--max-steps", 1)) == 0
    export = [
        "export",
        "--run",
        str(tmp_path / "run"),
        "--output-dir",
        str(tmp_path / "exported"),
        "--format",
    ]
    for kind in ("native", "nf4"):
        said = failing(capsys, main([*export, kind]))
        assert "a run in int8" in said
        assert "--format native" not in said


def test_a_folder_in_fp4_is_written_as_one(arguments, tmp_path, capsys):
    """Though the settings, which a stored folder does not heed, say NF4."""
    run, first, second = tmp_path / "run", tmp_path / "first", tmp_path / "second"
    assert main(arguments("quant.type=fp4", "--max-steps", 1)) == 0
    assert (
        main(["export", "--run", str(run), "--format", "native", "--output-dir", str(first)]) == 0
    )
    assert main(arguments("--model", first, "--max-steps", 1, name="again")) == 0
    export = ["export", "--run", str(tmp_path / "again"), "--output-dir", str(second), "--format"]
    assert "over a model in fp4" in failing(capsys, main([*export, "nf4"]))
    assert main([*export, "native"]) == 0
    said = json.loads((second / "config.json").read_text())["quantization_config"]
    assert said["bnb_4bit_quant_type"] == "fp4"


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


def test_a_cache_that_cannot_be_written_costs_time_alone(arguments, tmp_path, monkeypatch):
    def refused(**_):
        raise OSError(30, "Read-only file system")

    assert main(arguments(SECOND_BLOCK, "data.keep_hidden=false", name="not_kept")) == 0
    monkeypatch.setattr("qzo_diffusion.llm.kept_hidden.tempfile.TemporaryFile", refused)
    assert main(arguments(SECOND_BLOCK, name="refused")) == 0
    assert metrics(tmp_path / "refused") == metrics(tmp_path / "not_kept")


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
        (
            ["--method", "quzo", "qzo.parametrization=row", "train.optimizer=sgd"],
            "codes with method: quzo",
        ),
        (["--method", "quzo", "train.optimizer=adam"], "move in whole steps"),
        (["--method", "quzo", "quant.type=fp8", "qzo.probe=float"], "int8 or int4 codes"),
        (["qzo.parametrization=codes"], "needs quant.backend: intgrid"),
        (["train.optimizer=feedback"], "is for qzo.parametrization: codes"),
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


@pytest.mark.parametrize("method", ["qzo", "mezo", "quzo", "quzo-lora"])
def test_a_journal_alone_rebuilds_the_run(whole, tmp_path, capsys, method):
    trained = whole(method).results
    journal = str(whole(method).folder / "journal.qzo")
    assert main(["replay", "--journal", journal, "--output-dir", str(tmp_path / "again")]) == 0
    assert_same_weights(whole(method).folder, tmp_path / "again")
    assert main(["llm", "evaluate", "--run", str(tmp_path / "again"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == trained["accuracy"]["end"]


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


@pytest.mark.parametrize("method", ["awq", "fbgemm_fp8"])
def test_a_format_that_is_not_read_is_told(tmp_path, data, capsys, method):
    folder = save_tiny_llama(tmp_path / "model", seed=0)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": method}})
    )
    code = main(
        ["llm", "evaluate", "--task", "sst2", "--model", str(folder), "--data-dir", str(data)]
    )
    assert f"quantized by {method}" in failing(capsys, code)


def test_a_run_of_another_method_is_not_applied(arguments, tmp_path, capsys):
    assert main(arguments("--method", "qlora", "--max-steps", 1)) == 0
    code = main(["llm", "evaluate", "--run", str(tmp_path / "run"), "--method", "qzo"])
    assert "by qlora" in failing(capsys, code)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"train": {"max_steps": 500}},
            {
                "lr": 0.04,
                "parametrization": "separable",
                "layers": "quiet",
                "eps": 0.03,
                "per_example": True,
                "schedule": "cosine",
            },
        ),
        (
            {"qzo": {"normalize": False}},
            {"lr": 1e-3, "parametrization": "separable", "layers": None, "eps": 0.01},
        ),
        ({"train": {"max_steps": 2000}}, {"lr": 0.02, "normalize": True}),
        (
            {"qzo": {"layers": None}, "train": {"max_steps": 2000}},
            {"lr": 0.008, "parametrization": "separable", "eps": 0.01},
        ),
        (
            {"qzo": {"layers": ["mlp"], "eps": 0.02}, "train": {"max_steps": 2000}},
            {"lr": 0.008, "layers": ["mlp"], "eps": 0.02},
        ),
        ({"qzo": {"parametrization": "row"}}, {"parametrization": "row", "layers": "quiet"}),
        ({"quant": {"type": "int8"}}, {"parametrization": "separable", "layers": "quiet"}),
        (
            {"qzo": {"parametrization": "dense"}},
            {"lr": 1e-3, "per_example": False, "normalize": False},
        ),
        (
            {"method": "mezo"},
            {
                "lr": 1e-6,
                "eps": 1e-3,
                "units": "absolute",
                "directions": "gaussian",
                "schedule": "constant",
            },
        ),
        ({"method": "mezo", "train": {"lr": 1e-7}}, {"lr": 1e-7, "per_example": False}),
        ({"method": "qlora"}, {"lr": 2e-4}),
        (
            {"method": "quzo"},
            {
                "parametrization": "codes",
                "per_example": False,
                "normalize": False,
                "optimizer": "feedback",
            },
        ),
    ],
)
def test_what_is_not_given_suits_the_method(settings, expected):
    config = make_config(settings, LlmConfig)
    found = {**config.train.model_dump(), **config.qzo.model_dump(), "skip": config.quant.skip}
    assert {key: found[key] for key in expected} == expected
    assert (found["regions"], found["skip"]) == (1, ["lm_head"])
    assert make_config(config.model_dump(), LlmConfig) == config


def test_a_mean_loss_has_no_interval(tmp_path, model, data, capsys):
    task = tmp_path / "sentences.yaml"
    columns = (
        "train: [train.tsv]\ntest: [dev.tsv]\ncolumns: [sentence, label]\ntemplate: "
        '"{sentence}"\nmetric: loss\n'
    )
    task.write_text(f"name: sentences\n{columns}")
    command = [
        "llm",
        "train",
        "--task",
        task,
        "--model",
        model,
        "--data-dir",
        data,
        "--output-dir",
        tmp_path / "run",
    ]
    small = ["--max-steps", "2", "data.train_examples=12", "data.validation_examples=4"]
    assert main([*map(str, command), *small, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["loss"]["start"] > 1  # of which no share's interval could be taken
    assert "ci95" not in results
    assert main(["llm", "evaluate", "--run", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().err
    assert "on 12 examples of sentences" in said
    assert "±" not in said
