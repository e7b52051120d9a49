"""Language models in every stored format: trained, found again and exported, or refused."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qzo_diffusion.cli import main
from qzo_diffusion.config.files import load_config, make_config
from qzo_diffusion.config.llm import LlmConfig
from qzo_diffusion.llm.causal_lm import load_causal_lm
from qzo_diffusion.quant.load import find_scales, quantize_
from qzo_diffusion.runs.llm.methods import apply_, load_base
from qzo_diffusion.runs.tuned import load_scales
from tests.conftest import failing
from tests.quant.stored_formats import convert_folder
from tests.runs.llm.short_run import EACH_STEP, assert_found_again
from tests.tiny_llama import save_tiny_llama


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


@pytest.mark.parametrize(
    "more",
    [["quant.type=int4"], ["quant.type=fp8"], ["quant.activations=int8"]],
)
def test_other_grids_and_rounded_inputs_are_trained_and_found_again(
    arguments, tmp_path, capsys, more
):
    large = ["--max-steps", 3, "train.lr=0.5", *EACH_STEP]  # steps that no grid rounds away
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
