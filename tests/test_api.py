"""The code in docs/api.md and docs/extending.md is run as it stands."""

import re
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

from qzo_diffusion.api import find_scales, tune_
from qzo_diffusion.core.errors import ModelError
from tests.quantized import inputs, network, squared_output

DOCUMENT = Path(__file__).parents[1] / "docs" / "api.md"
EXTENDING = DOCUMENT.with_name("extending.md")


def test_the_tour_runs_and_its_loss_falls(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 22, (
        "the tour promises about 20 lines"
    )
    names: dict[str, object] = {}
    exec(compile(code, str(DOCUMENT), "exec"), names)
    first, last = re.match(r"([\d.]+) -> ([\d.]+)", capsys.readouterr().out).groups()
    assert float(last) < 0.8 * float(first)


def test_ideas_of_ones_own_run_block_after_block_and_their_losses_fall(
    capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # for their journal
    names: dict[str, object] = {"__name__": "ideas"}
    for code in re.findall(r"```python\n(.*?)```", EXTENDING.read_text(), re.DOTALL):
        exec(compile(code, str(EXTENDING), "exec"), names)
    step, replayed, ranks, slopes = capsys.readouterr().out.splitlines()
    for told in (step, ranks):
        first, last = map(float, told.split(" -> "))
        assert last < 0.5 * first
    assert replayed == "replayed bit for bit: True"
    assert slopes == "512 slopes"


def test_layer_level_is_merged_when_done():
    model = network("bnb")
    before = find_scales(model)["0"].clone()
    tune_(model, squared_output(model), [inputs()], steps=5, lr=0.1, level="layer")
    after = find_scales(model)["0"]
    ratio = after / before
    assert not torch.equal(before, after)
    assert ratio.std() < 1e-6 * ratio.mean()


@pytest.mark.parametrize("layers", [["2"], "2"])
def test_only_the_layers_that_are_named_change(layers):
    model = network("bnb")
    before = {name: scale.clone() for name, scale in find_scales(model).tensors().items()}
    tune_(model, squared_output(model), [inputs()], steps=2, lr=0.1, layers=layers)
    changed = [
        name
        for name, scale in find_scales(model).tensors().items()
        if not torch.equal(scale, before[name])
    ]
    assert changed == ["2"]


def test_layers_that_are_not_there_are_told_with_one_that_is():
    with pytest.raises(ModelError, match="such as 0"):
        tune_(network(), len, [inputs()], steps=1, lr=0.1, layers=["2", "mlp"])
    with pytest.raises(ModelError, match="such as 0"):
        tune_(network(), len, [inputs()], steps=1, lr=0.1, layers=[])


def test_normalised_steps_do_not_depend_on_the_scale_of_the_loss():
    after = []
    for unit in (1.0, 64.0):  # a power of two, so that slopes have the same digits
        model = network()
        loss = squared_output(model)
        tune_(
            model,
            lambda x, loss=loss, unit=unit: unit * loss(x),
            [inputs()],
            steps=3,
            lr=0.05,
            num_directions=4,
            normalize=True,
        )
        after.append(find_scales(model)["0"].clone())
    assert torch.equal(*after)


def test_batches_may_be_a_function_of_the_step():
    model, seen = network(), []
    tune_(
        model,
        squared_output(model),
        lambda step: seen.append(step) or inputs(seed=step),
        steps=3,
        lr=1e-3,
    )
    assert seen == [0, 1, 2]


def test_a_scalar_loss_will_do():
    model = network()
    outcome = tune_(model, lambda x: model(x).square().mean(), [inputs()], steps=2, lr=1e-3)
    assert outcome.steps_done == 2


def test_the_model_is_left_without_hooks():
    model = network()
    tune_(model, squared_output(model), [inputs()], steps=1, lr=1e-3)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_model_without_quantized_layers_is_refused():
    with pytest.raises(ModelError, match="without quantized layers"):
        tune_(nn.Linear(4, 4), lambda x: x, [inputs()], steps=1, lr=1e-3)
