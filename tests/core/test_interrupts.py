"""An interrupt at any line of an override leaves scales, biases and hooks as they were."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from qzo_diffusion import api
from qzo_diffusion.core import activation_scaling, exact_product, hooks, oracle, scales, weights
from qzo_diffusion.core.activation_scaling import LayerScaling
from qzo_diffusion.core.dense import Dense
from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.core.weights import WeightHandle
from qzo_diffusion.quant import bnb, reference
from qzo_diffusion.quant.load import handles_of
from tests.quantized import assert_same, inputs, network, scaled_network, snapshot, squared_output

FILES = {
    module.__file__
    for module in (
        scales,
        hooks,
        activation_scaling,
        weights,
        oracle,
        exact_product,
        reference,
        bnb,
    )
}


def interrupted(work: Callable[[], object], at: int, files: set = FILES, opcodes=False) -> bool:
    """Run `work` with a KeyboardInterrupt at the line number `at` that runs in `files`.

    Returns False when fewer lines run. A tracer that raises is called no more, so it comes once.
    """
    left = at

    def trace(frame, event, _argument):
        nonlocal left
        if frame.f_code.co_filename not in files:
            return None
        frame.f_trace_opcodes = opcodes
        if event == ("opcode" if opcodes else "line"):
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def set_hooks(model: nn.Module) -> list[tuple[str, list[int]]]:
    return [
        (name, [*module._forward_pre_hooks, *module._forward_hooks])
        for name, module in model.named_modules()
    ]


def check_every_line(model: nn.Module, live: ScaleSet, work: Callable[[], object]) -> None:
    before, hooked = snapshot(model, live), set_hooks(model)
    biases = [
        module.bias for module in model if isinstance(module, nn.Module) and hasattr(module, "bias")
    ]
    tensors = live.tensors()
    plain = model(inputs())
    at = 0
    while interrupted(work, at):
        assert_same(before, snapshot(model, live))
        assert set_hooks(model) == hooked, at
        assert all(a is b for a, b in zip(biases, (model[0].bias, model[2].bias), strict=True)), at
        assert torch.equal(model(inputs()), plain), at
        at += 1
    assert at > 30
    assert all(live[name] is tensor for name, tensor in tensors.items())


@pytest.mark.parametrize("backend", ["reference", "bnb"])
@pytest.mark.parametrize("at_once", [1, 2**20])
@pytest.mark.parametrize("scaled", [False, True])
def test_an_override_is_undone(monkeypatch, backend, at_once, scaled):
    monkeypatch.setattr("qzo_diffusion.core.scales.OVERRIDDEN_AT_ONCE", at_once)
    model, live = scaled_network(backend)

    def doubled(names):
        return {name: live[name] * 2 for name in names}

    def factors(names):
        return {
            name: LayerScaling(torch.full((1, 1), 1.5), torch.full((1, 1), 0.5)) for name in names
        }

    def work():
        with live.override(doubled, factors if scaled else None):
            model(inputs())

    check_every_line(model, live, work)


def test_an_override_within_another_is_undone():
    model, live = scaled_network()

    def work():
        with live.override(lambda names: {name: live[name] * 2 for name in names}):
            with live.override(lambda names: {name: live[name] * 3 for name in names}):
                model(inputs())
            model(inputs())

    check_every_line(model, live, work)


def test_an_outer_override_stands_after_an_interrupt_in_an_inner_one():
    model, live = scaled_network()

    def times(factor):
        return live.override(lambda names: {name: live[name] * factor for name in names})

    def inner():
        with times(3):
            model(inputs())

    with times(2):
        expected, at = model(inputs()), 0
        while interrupted(inner, at):
            assert torch.equal(model(inputs()), expected), at
            at += 1
    assert at > 30


def test_tensors_of_a_16_bit_model_are_put_back():
    linear = nn.Sequential(nn.Linear(128, 8), nn.Tanh(), nn.Linear(8, 8)).to(torch.bfloat16)
    live = ScaleSet([WeightHandle("0.weight", linear[0].weight, [linear[0]])])

    def work():
        with live.override(lambda names: {name: live[name] + 1 for name in names}):
            linear(inputs(dtype=torch.bfloat16))

    before, at = linear[0].weight.detach().clone(), 0
    while interrupted(work, at):
        assert torch.equal(linear[0].weight, before), at
        assert not any(ids for _, ids in set_hooks(linear)), at
        at += 1
    assert at > 10


def test_the_exact_gradient_leaves_no_hooks():
    model, live = scaled_network()
    theta = Dense(live)

    def work():
        handles = list(handles_of(model))
        oracle.exact_gradient(squared_output(model), [inputs()], theta, handles)

    check_every_line(model, live, work)


@pytest.mark.parametrize("level", ["dense", "separable"])
def test_a_notebook_gets_its_model_back(level):
    """`api.tune_` at a rate of zero: whenever it is interrupted, the model is what it was."""
    model = network()
    live = api.find_scales(model)

    def work():
        api.tune_(model, squared_output(model), [inputs()], steps=1, lr=0.0, level=level)

    files = FILES | {str(Path(scales.__file__).with_name("spsa.py")), scales.__file__}
    before, at = snapshot(model, live), 0
    while interrupted(work, at, files):
        assert_same(before, snapshot(model, live))
        assert not any(ids for _, ids in set_hooks(model)), at
        at += 1
    assert at > 30
