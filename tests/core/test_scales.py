"""A perturbation is shown to a forward and never written: bit for bit, after exceptions and
interrupts too.
"""

import pytest
import torch
from torch import nn

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.core.noise import Direction, directions_of_step
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.core.scales import ScaleSet
from tests.quantized import (
    BACKENDS,
    assert_same,
    estimated,
    inputs,
    scaled_network,
    snapshot,
    squared_output,
)

LEVELS = [
    ("dense", "absolute"),
    *((level, "relative") for level in ("dense", "row", "layer", "column", "separable")),
]


@pytest.mark.parametrize(("backend", "quant_type", "blocksize"), BACKENDS)
@pytest.mark.parametrize(("level", "units"), LEVELS)
def test_estimates_leave_everything_bit_for_bit(backend, quant_type, blocksize, level, units):
    model, scales = scaled_network(backend, quant_type, blocksize)
    theta = parametrize(scales, level, units)
    before = snapshot(model, scales)
    plain = model(inputs())
    for step in range(20):
        estimated(squared_output(model), [inputs()], theta, [Direction(0, step)], eps=1e-2)
    assert_same(before, snapshot(model, scales))
    assert torch.equal(plain, model(inputs()))


class Interruptible(nn.Module):
    """Raises in the middle of the second layer's forward, while its scales are displaced."""

    def __init__(self, inner: nn.Module, error: BaseException) -> None:
        super().__init__()
        self.inner, self.error, self.displaced = inner, error, None

    def arm(self, layer: nn.Module, scales: ScaleSet, name: str, handle_scales) -> None:
        original = layer.forward

        def broken(x):
            self.displaced = not torch.equal(handle_scales(), scales[name])
            original(x)
            raise self.error

        layer.forward = broken

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("backend", ["reference", "bnb"])
@pytest.mark.parametrize(("level", "units"), LEVELS)
def test_an_exception_inside_a_forward_puts_everything_back(error, backend, level, units):
    model, scales = scaled_network(backend)
    theta = parametrize(scales, level, units)
    before = snapshot(model, scales)
    layer = model[2]
    seen = (
        (lambda: layer.absmax)
        if backend == "reference"
        else (lambda: layer.weight.quant_state.absmax)
    )
    wrapped = Interruptible(model, error)
    original = layer.forward
    wrapped.arm(layer, scales, "2", seen)
    with pytest.raises(type(error)):
        estimated(squared_output(wrapped), [inputs()], theta, [Direction(0, 0)], eps=1e-2)
    layer.forward = original
    # Changes that are factors of inputs and outputs leave even the running layer's scales alone.
    assert wrapped.displaced is not theta.scales_activations
    assert torch.equal(seen(), scales["2"])
    assert_same(before, snapshot(model, scales))


def doubled(scales):
    return lambda names: {name: scales[name] * 2 for name in names}


def test_large_models_are_shown_a_few_layers_at_a_time(monkeypatch):
    monkeypatch.setattr("qzo_diffusion.core.scales.OVERRIDDEN_AT_ONCE", 1)
    model, scales = scaled_network()
    assert scales.chunks() == [["0"], ["2"]]
    live = {name: scales[name] for name in scales}
    displaced = []

    def count(_module, _args, _output=None):
        displaced.append(
            [name for name in scales if model.get_submodule(name).absmax is not live[name]]
        )

    for layer in model:
        layer.register_forward_hook(count)
    plain = model(inputs())
    displaced.clear()
    with scales.override(doubled(scales)):
        seen = model(inputs())
    assert displaced == [["0"], ["0"], ["2"]]
    assert not torch.equal(seen, plain)
    assert torch.equal(plain, model(inputs()))


@pytest.mark.parametrize("level", [level for level, _ in LEVELS[1:]])
def test_a_few_layers_at_a_time_give_the_same_estimate(monkeypatch, level):
    found = []
    for at_once in (2**20, 1):
        monkeypatch.setattr("qzo_diffusion.core.scales.OVERRIDDEN_AT_ONCE", at_once)
        model, scales = scaled_network("bnb")
        theta = parametrize(scales, level)
        theta.move_([Direction(3, 3)], [0.03])
        for per_example in (False, True) if theta.scales_activations else (False,):
            directions = directions_of_step(0, 0, 6 if per_example else 2, "rademacher")
            found.append(
                estimated(
                    squared_output(model),
                    [inputs()],
                    theta,
                    directions,
                    eps=1e-2,
                    per_example=per_example,
                )
            )
    assert found[: len(found) // 2] == found[len(found) // 2 :]


def test_a_view_is_seen_by_the_forward():
    model, scales = scaled_network("bnb")
    plain = model[0](inputs()) - model[0].bias
    with scales.override(doubled(scales)):
        twice = model[0](inputs()) - model[0].bias
    # Doubling is exact in every product and sum; only adding and subtracting the bias again rounds.
    torch.testing.assert_close(twice, 2 * plain, rtol=0, atol=4 * 2**-23 * plain.abs().max().item())


def test_views_nest_and_end():
    model, scales = scaled_network()
    with scales.override(doubled(scales)):
        outer = model(inputs())
        with scales.override(None):
            inner = model(inputs())
        assert torch.equal(outer, model(inputs()))
    assert torch.equal(inner, model(inputs()))
    assert not torch.equal(outer, inner)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt()])
@pytest.mark.parametrize("at_once", [1, 2**20])
def test_outside_of_a_view_the_model_has_no_hooks(monkeypatch, error, at_once):
    monkeypatch.setattr("qzo_diffusion.core.scales.OVERRIDDEN_AT_ONCE", at_once)
    model, scales = scaled_network()
    try:
        with scales.override(doubled(scales)):
            if at_once == 1:
                assert all(len(model[index]._forward_pre_hooks) == 1 for index in (0, 2))
            if error:
                raise error
    except KeyboardInterrupt:
        pass
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_no_layers_is_an_error():
    with pytest.raises(ModelError, match="without quantized layers"):
        ScaleSet([])


def test_half_precision_scales_are_refused():
    model, scales = scaled_network()
    model[0].absmax = model[0].absmax.half()
    with pytest.raises(ModelError, match="float16"):
        ScaleSet(scales._handles.values())
