"""Norm gains, biases and embeddings trained beside the scales by the same estimate, as the QZO
paper does with AQLM models.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from qzo_diffusion.cli import main
from qzo_diffusion.config.files import load_config
from qzo_diffusion.config.llm import LlmConfig
from qzo_diffusion.core.absolute import DenseAbsolute
from qzo_diffusion.core.noise import directions_of_step
from qzo_diffusion.core.optimizer import Sgd
from qzo_diffusion.core.probing import Probing, StepBatch
from qzo_diffusion.llm.causal_lm import load_causal_lm
from qzo_diffusion.quant.load import find_scales, quantize_
from qzo_diffusion.quant.unquantized import unquantized_of
from qzo_diffusion.runs.llm.methods import load_base
from qzo_diffusion.train.loop import Setup, train_step_
from tests.conftest import failing, killed_after, metrics
from tests.quant.stored_formats import convert_folder
from tests.quantized import assert_same
from tests.tiny_llama import save_tiny_llama, tiny_llama, write_sentences

PAPER = [
    "qzo.parametrization=dense",
    "qzo.units=absolute",
    "qzo.directions=gaussian",
    "qzo.eps=1e-3",
    "qzo.unquantized=all",
]
IDS = torch.arange(12).view(2, 6)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def quantized_llama(which, dtype=torch.float32):
    lm = tiny_llama()
    quantize_(lm.model, skip=["lm_head"])
    lm.model.to(dtype)
    return lm.model, DenseAbsolute(find_scales(lm.model, unquantized_of(lm.model, which)))


def logits(model):
    return model(input_ids=IDS).logits.float()


def objective_of(model):
    return lambda ids: (logits(model)[:, -1] ** 2).mean(-1)


def everything(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def step_of(objective, theta, probing):
    setup = Setup(objective, lambda _: batch, theta, Sgd(), probing, lambda _: 1e-6)
    batch = StepBatch([IDS])
    return train_step_(setup, batch, 0)


def test_what_is_found():
    model, gains = quantized_llama("gains")
    assert gains.scales.weights == {
        name for name, one in model.named_parameters() if "norm" in name
    }
    _, all_of_it = quantized_llama("all")
    # the output head is the same
    assert all_of_it.scales.weights - gains.scales.weights == {"model.embed_tokens.weight"}
    assert len(all_of_it.scales) == 2 * 7 + 5 + 1
    assert len(quantized_llama("none")[1].scales) == 2 * 7


def test_a_step_moves_scales_and_weights_along_the_same_derivative():
    model, theta = quantized_llama("all")
    start = {name: one.clone() for name, one in theta.templates().items()}
    probing = Probing(seed=3, eps=1e-3, distribution="gaussian")
    record = step_of(objective_of(model), theta, probing)
    (direction,) = directions_of_step(3, 0, 1, "gaussian")
    assert record.projected_grad != 0
    for name, before in start.items():
        expected = before - 1e-6 * record.projected_grad * direction.z(name, before)
        torch.testing.assert_close(theta.templates()[name], expected, rtol=0, atol=1e-7, msg=name)


def test_only_scales_stop_at_zero():
    _, theta = quantized_llama("all")
    for name, one in theta.templates().items():
        theta.add_(name, torch.full_like(one, -1e3))
        assert (one < 0).all() if name in theta.scales.weights else (one == 0).all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("few", [2**16, 64])  # all layers at once, and one at a time
def test_a_shared_tensor_is_seen_by_all_that_use_it(monkeypatch, few, dtype):
    """At its beginning and its end a tied embedding is the changed one; a norm between them too."""
    monkeypatch.setattr("qzo_diffusion.core.scales.FEW", few)
    model, theta = quantized_llama("all", dtype)
    changed, before = (
        ["model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"],
        everything(model),
    )
    plain = logits(model)
    with theta.scales.override(
        lambda names: {name: theta.scales[name] * 1.25 for name in names if name in changed}
    ):
        seen = logits(model)
    assert torch.equal(logits(model), plain)
    assert_same(before, everything(model))
    for name in changed:
        model.get_parameter(name).data *= 1.25
    assert torch.equal(logits(model), seen)
    assert not torch.equal(seen, plain)


@pytest.mark.parametrize("few", [2**16, 64])
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_an_exception_inside_a_forward_puts_everything_back(monkeypatch, few, error):
    monkeypatch.setattr("qzo_diffusion.core.scales.FEW", few)
    model, theta = quantized_llama("all", torch.bfloat16)
    before = everything(model)

    def objective(ids):
        logits(model)
        raise error

    with pytest.raises(type(error)):
        step_of(objective, theta, Probing(seed=0, eps=1e-3))
    assert_same(before, everything(model))
    assert not model.model.norm._forward_pre_hooks


def test_updates_below_a_bfloat16_step_add_up():
    model, theta = quantized_llama("gains", torch.bfloat16)
    gain = model.model.norm.weight
    assert (gain == 1).all()
    for _ in range(100):
        # of steps of 0.0078
        theta.add_("model.norm.weight", torch.full_like(gain, 1e-4, dtype=torch.float32))
    with theta.scales.override(theta.perturbed()):
        logits(model)
    theta.merge_()
    assert gain.dtype == torch.bfloat16
    torch.testing.assert_close(
        model.model.norm.weight.float(),
        torch.full_like(gain, 1.01, dtype=torch.float32),
        rtol=0,
        atol=0.004,
    )
    assert (model.model.norm.weight > 1).all()


@pytest.fixture
def folders(tmp_path):
    plain = save_tiny_llama(tmp_path / "plain")
    for kind in ("aqlm", "gptq", "hqq"):
        convert_folder(plain, tmp_path / kind, kind)
    return {
        "bitsandbytes": plain,
        "aqlm": tmp_path / "aqlm",
        "gptq": tmp_path / "gptq",
        "hqq": tmp_path / "hqq",
    }


@pytest.fixture
def arguments(tmp_path):
    data = write_sentences(tmp_path / "sentences")

    def build(model, *more, name="run"):
        base = [
            "llm",
            "train",
            "--task",
            "sst2",
            "--model",
            model,
            "--data-dir",
            data,
            "--max-steps",
            6,
        ]
        small = [
            "data.batch_size=4",
            "data.train_examples=16",
            "data.validation_examples=8",
            "train.validate_every=2",
        ]
        rest = ["train.lr=1e-5", "train.checkpoint_every=2", "compute.dtype=float32", *PAPER]
        return [
            str(part) for part in [*base, *small, *rest, "--output-dir", tmp_path / name, *more]
        ]

    return build


@pytest.mark.parametrize("kind", ["bitsandbytes", "aqlm", "gptq", "hqq"])
def test_a_run_is_evaluated_replayed_and_exported(arguments, folders, tmp_path, capsys, kind):
    """In bfloat16, where the model alone would be as old as its last view."""
    folder = folders[kind]
    assert main(arguments(folder, "compute.dtype=bfloat16", "--json")) == 0
    trained = json.loads(capsys.readouterr().out)
    final = load_file(tmp_path / "run" / "final" / "scales.safetensors")
    base = load_causal_lm(folder, torch.bfloat16).model
    moved = [
        name
        for name, one in final.items()
        if name.endswith(".weight") and not torch.equal(one, base.get_parameter(name).float())
    ]
    assert "model.embed_tokens.weight" in moved
    assert len(moved) == 6
    assert main(["llm", "evaluate", "--run", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == trained["accuracy"]["end"]
    journal = str(tmp_path / "run" / "journal.qzo")
    assert main(["replay", "--journal", journal, "--output-dir", str(tmp_path / "again")]) == 0
    assert_same(final, load_file(tmp_path / "again" / "final" / "scales.safetensors"))
    export = [
        "export",
        "--run",
        str(tmp_path / "run"),
        "--format",
        "native",
        "--output-dir",
        str(tmp_path / "exported"),
    ]
    assert main(export) == 0
    exported = load_causal_lm(tmp_path / "exported", torch.bfloat16).model
    for name in moved:
        # GPTQ's and AQLM's folders keep the fp32 of the plain one, bitsandbytes' have the dtype of
        # the run
        assert torch.equal(exported.get_parameter(name).cpu(), final[name].bfloat16())


def test_a_killed_run_goes_on_bit_for_bit(arguments, folders, tmp_path, monkeypatch):
    more = ["compute.dtype=bfloat16", "train.optimizer=adam"]
    assert main(arguments(folders["aqlm"], *more, name="whole")) == 0
    with monkeypatch.context() as patched:
        killed_after(patched, 5)
        assert main(arguments(folders["aqlm"], *more, name="killed")) == 130
    assert (
        main(arguments(folders["aqlm"], "--resume", tmp_path / "killed", *more, name="killed")) == 0
    )
    whole, killed = (
        load_file(tmp_path / name / "final" / "scales.safetensors") for name in ("whole", "killed")
    )
    assert_same(whole, killed)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")


def test_layers_choose_among_quantized_ones_alone(folders):
    settings = {
        "parametrization": "dense",
        "units": "absolute",
        "unquantized": "gains",
        "layers": ["mlp"],
    }
    config = LlmConfig.model_validate({"model": str(folders["aqlm"]), "qzo": settings})
    base = load_base(config, folders["aqlm"], torch.device("cpu"), torch.float32)
    kinds = {
        name.split(".")[-2] if name in base.scales.weights else name.split(".")[-1]
        for name in base.trained
    }
    assert kinds == {
        "gate_proj",
        "up_proj",
        "down_proj",
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
    }
    assert set(base.trained) == set(base.theta.templates())


@pytest.mark.parametrize(
    ("more", "wrong"),
    [
        (["qzo.units=relative"], "qzo.units: absolute"),
        (["--method", "mezo"], "with method: qzo"),
        (["qzo.unquantized=some"], "unquantized"),
        (["qzo.layers=[nothing]"], "no such layer"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, folders, capsys, more, wrong):
    assert wrong in failing(capsys, main(arguments(folders["bitsandbytes"], *more)))


def test_settings_are_kept_with_the_run(arguments, folders, tmp_path):
    assert main(arguments(folders["aqlm"], "--max-steps", 1)) == 0
    assert load_config(tmp_path / "run" / "config.yaml", LlmConfig).qzo.unquantized == "all"
