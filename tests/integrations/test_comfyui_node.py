"""The node for ComfyUI against a stub of its protocol."""

import importlib.util
import inspect
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from qzo_diffusion.core.delta import shrunk
from qzo_diffusion.core.errors import ModelError, OutputError
from qzo_diffusion.core.merge import merge_changes_
from qzo_diffusion.diffusion.families.sd3 import SD3
from qzo_diffusion.quant.base import linears_to_quantize
from qzo_diffusion.quant.gguf import GgufLinear
from qzo_diffusion.quant.load import codes_fingerprint, find_scales, quantize_
from qzo_diffusion.runs.provenance import DELTA_FORMAT
from qzo_diffusion.train.run_folder import save_tensors
from tests.integrations import comfyui_stub as stub
from tests.small_models import sd3_inputs, sd3_transformer

FILE = Path(__file__).parents[2] / "integrations" / "comfyui" / "qzo_delta.py"
SKIP = SD3.denoiser.skip
LINEARS = {"nf4": stub.Nf4Linear, "gguf": stub.GgufLinear}


@pytest.fixture(scope="module")
def node():
    spec = importlib.util.spec_from_file_location("qzo_delta", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.NODE_CLASS_MAPPINGS["QzoDelta"]


def quantized(model, kind):
    """Diffusers' model over the codes that a run trains on."""
    if kind == "nf4":
        quantize_(model, skip=SKIP)
        return model
    for name, linear in list(linears_to_quantize(model, SKIP, 32)):
        loaded = stub.GgufLinear(linear.weight.detach(), None)
        codes = loaded.weight.as_subclass(torch.Tensor)
        parent, _, child = name.rpartition(".")
        made = GgufLinear(codes, "Q4_0", None, linear.bias)
        setattr(model.get_submodule(parent), child, made)
    return model


def changed(scales):
    generator = torch.Generator().manual_seed(2)

    def factor(one):
        return 1 + 0.2 * torch.rand(one.shape, generator=generator)

    return {name: scales[name] * factor(scales[name]) for name in scales}


@pytest.fixture(params=["nf4", "gguf"])
def case(request, tmp_path):
    """ComfyUI's model, a delta for it, and diffusers' models of strength 0, 0.5 and 1."""
    plain = sd3_transformer("medium")
    names = [name for name, _ in linears_to_quantize(plain, SKIP, 64)]
    models = {}
    for strength in (0.0, 0.5, 1.0):
        model = quantized(deepcopy(plain), request.param)
        scales = find_scales(model)
        tuned = changed(scales)
        if strength == 0:
            facts = {"qzo.codes": codes_fingerprint(model), "qzo.format": DELTA_FORMAT}
            save_tensors(tmp_path / "scales.safetensors", shrunk(scales, tuned), facts)
        merge_changes_(scales, [(tuned, strength)])
        models[strength] = model
    network = stub.Network(deepcopy(plain), names, LINEARS[request.param])
    loaded = stub.ModelPatcher(stub.BaseModel(network))
    return loaded, str(tmp_path / "scales.safetensors"), models


@pytest.fixture
def conditions():
    found = sd3_inputs(sd3_transformer("medium"))
    return found["hidden_states"], {
        "context": found["encoder_hidden_states"],
        "y": found["pooled_projections"],
    }


@torch.no_grad()
def wanted(model, x, sigma, context, y):
    return model(
        hidden_states=x,
        timestep=1000 * sigma,
        encoder_hidden_states=context,
        pooled_projections=y,
    ).sample


def weights_of(network):
    return {
        name: module.dequantized().clone()
        for name, module in network.named_modules()
        if hasattr(module, "dequantized")
    }


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_predictions_are_those_of_the_run_between_the_levels(node, case, conditions, strength):
    loaded, delta, models = case
    x, conditions = conditions
    before = weights_of(loaded.model.diffusion_model)
    (patched,) = node().apply(loaded, delta, strength, 0.2, 0.7)
    for level, expected in ((0.1, 0.0), (0.2, strength), (0.7, strength), (0.8, 0.0)):
        sigma = torch.full((2,), level)
        got = patched.predict(x, sigma, **conditions)
        reference = wanted(models[expected], x, sigma, **conditions)
        other = wanted(models[strength - expected], x, sigma, **conditions)
        assert torch.allclose(got, reference, atol=1e-5), level
        assert not torch.allclose(got, other, atol=1e-3), level
        # the model that was loaded predicts what it did
        base = loaded.predict(x, sigma, **conditions)
        assert torch.allclose(base, wanted(models[0.0], x, sigma, **conditions), atol=1e-5)
    assert same(before, weights_of(loaded.model.diffusion_model))
    assert "model_function_wrapper" not in loaded.model_options


def test_an_error_in_a_prediction_leaves_the_model_as_it_was(node, case, conditions):
    loaded, delta, _ = case
    x, conditions = conditions
    network = loaded.model.diffusion_model
    before = weights_of(network)

    def fails(function, call):
        function(call["input"], call["timestep"], **call["c"])
        raise KeyboardInterrupt

    loaded.set_model_unet_function_wrapper(fails)
    (patched,) = node().apply(loaded, delta, 1.0, 0.0, 1.0)
    with pytest.raises(KeyboardInterrupt):
        patched.predict(x, torch.full((2,), 0.5), **conditions)
    assert same(before, weights_of(network))
    assert not any("forward" in vars(module) for module in network.modules())


def test_a_wrapper_of_another_node_is_kept(node, case, conditions):
    loaded, delta, models = case
    x, conditions = conditions
    sigma = torch.full((2,), 0.5)
    loaded.set_model_unet_function_wrapper(
        lambda function, call: 2 * function(call["input"], call["timestep"], **call["c"])
    )
    (patched,) = node().apply(loaded, delta, 1.0, 0.0, 1.0)
    got = patched.predict(x, sigma, **conditions)
    assert torch.allclose(got, 2 * wanted(models[1.0], x, sigma, **conditions), atol=1e-5)


def test_other_models_are_refused(node, case, tmp_path):
    loaded, delta, _ = case
    plain = sd3_transformer("medium", seed=1)
    names = [name for name, _ in linears_to_quantize(plain, SKIP, 64)]
    linear = type(loaded.model.diffusion_model.joint_blocks.get_submodule("0.x_block.attn.qkv"))
    other = stub.ModelPatcher(stub.BaseModel(stub.Network(plain, names, linear)))
    with pytest.raises(ModelError, match="over other codes"):
        node().apply(other, delta, 1.0, 0.0, 1.0)
    unquantized = stub.ModelPatcher(stub.BaseModel(torch.nn.Linear(4, 4)))
    with pytest.raises(ModelError, match="without quantized layers"):
        node().apply(unquantized, delta, 1.0, 0.0, 1.0)
    with pytest.raises(OutputError):
        node().apply(loaded, str(tmp_path / "nothing"), 1.0, 0.0, 1.0)


def test_the_node_keeps_to_the_protocol(node):
    inputs = node.INPUT_TYPES()["required"]
    parameters = list(inspect.signature(getattr(node, node.FUNCTION)).parameters)
    assert list(inputs) == parameters[1:]
    assert inputs["model"] == ("MODEL",)
    assert node.RETURN_TYPES == ("MODEL",)
    assert isinstance(node.CATEGORY, str)
    for kind, settings in list(inputs.values())[2:]:
        assert kind == "FLOAT"
        assert settings["min"] <= settings["default"] <= settings["max"]
