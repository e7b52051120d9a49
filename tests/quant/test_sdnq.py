"""SDNQ's folders: read, tuned, and written back under the same names."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.diffusion.transformer import empty_transformer, find_transformer
from qzo_diffusion.quant import sdnq
from qzo_diffusion.quant.branched import rotated
from qzo_diffusion.quant.load import find_scales
from qzo_diffusion.quant.stream import Quantization, fill_
from tests.small_models import sd3_inputs, sd3_transformer

CPU = torch.device("cpu")
RUN, RANK, ROTATION = 32, 4, 32
KINDS = ["uint4", "int8", "uint4_svd"]


def quantized(weight, kind):
    """The tensors of a layer as the package stores them, and the weight that they stand for."""
    runs = weight if kind == "int8" else rotated(weight, ROTATION) if "svd" in kind else weight
    state, branch = {}, 0
    if "svd" in kind:
        left, values, right = torch.linalg.svd(runs)
        state = {"svd_up": left[:, :RANK] * values[:RANK], "svd_down": right[:RANK].contiguous()}
        branch = state["svd_up"] @ state["svd_down"]
    rest = runs - branch
    if kind == "int8":
        scale = rest.abs().amax(1, keepdim=True) / 127
        codes = (rest / scale).round().to(torch.int8)
        return {"weight": codes, "scale": scale}, codes * scale
    groups = rest.unflatten(1, (-1, RUN))
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scale = (high - low) / 15
    codes = ((groups - low) / scale).round().to(torch.uint8)
    pairs = codes.view(-1, 2)
    packed = (pairs[:, 0] | (pairs[:, 1] << 4)).view(len(weight), -1)
    whole = (codes * scale + low).flatten(1) + branch
    state |= {"weight": packed, "scale": scale, "zero_point": low}
    return state, rotated(whole, ROTATION) if "svd" in kind else whole


@pytest.fixture(params=KINDS)
def folder(request, tmp_path):
    """A folder in the package's layout, with the plain weights that it stands for beside it."""
    model = sd3_transformer()
    model.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    stored, plain = load_file(file), model.state_dict()
    for name in [one for one in stored if one.startswith("transformer_blocks")]:
        if name.endswith(".weight") and stored[name].dim() == 2:
            state, plain[name] = quantized(stored.pop(name), request.param)
            layer = name.removesuffix(".weight")
            stored |= {f"{layer}.{part}": one.contiguous() for part, one in state.items()}
    save_file(stored, file)
    config = json.loads((tmp_path / "config.json").read_text())
    settings = {"quant_method": "sdnq", "use_hadamard": "svd" in request.param}
    config["quantization_config"] = settings | {"hadamard_group_size": ROTATION}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model.load_state_dict(plain)
    return tmp_path, model


def loaded(folder, how=None):
    found = find_transformer(folder)
    model = empty_transformer(found.config)
    filled = fill_(model, found.entries, how, dtype=torch.float32, device=CPU)
    return found, model, filled


def test_a_folder_computes_what_its_weights_stand_for(folder):
    place, plain = folder
    _, model, filled = loaded(place, Quantization())
    assert filled.taken_over
    assert (filled.quantized, filled.unused) == (0, [])
    x = sd3_inputs(plain)
    with torch.no_grad():
        torch.testing.assert_close(model(**x).sample, plain(**x).sample, rtol=1e-4, atol=1e-4)


def test_untrained_scales_change_no_byte_and_tuned_ones_their_own_tensors(folder):
    place, _ = folder
    found, model, _ = loaded(place)
    scales, before = find_scales(model), load_file(place / "diffusion_pytorch_model.safetensors")
    written = {n: one.make() for n, one in sdnq.pending_tensors(found.entries, scales).items()}
    assert written.keys() == before.keys()
    for name, tensor in before.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor)
    for name in scales:
        scales[name].mul_(1.25)
    with torch.no_grad():
        shown = model(**sd3_inputs(model)).sample
    tuned = {n: one.make() for n, one in sdnq.pending_tensors(found.entries, scales).items()}
    for name, tensor in before.items():
        factor = 1.25 if name.rpartition(".")[2] in ("scale", "zero_point", "svd_down") else 1
        torch.testing.assert_close(tuned[name], tensor * factor if factor > 1 else tensor)
    save_file(tuned, place / "diffusion_pytorch_model.safetensors")
    _, again, _ = loaded(place)
    with torch.no_grad():
        got = again(**sd3_inputs(again)).sample
    torch.testing.assert_close(got, shown, rtol=1e-4, atol=1e-4)


def test_settings_and_layers_that_are_not_read_are_named(folder):
    place, _ = folder
    config = json.loads((place / "config.json").read_text())
    config["quantization_config"]["use_codebook"] = True
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="use_codebook = True"):
        find_transformer(place)
    linear = torch.nn.Linear(64, 8)
    with pytest.raises(ModelError, match=r"a\.b is no layer of SDNQ"):
        sdnq.layer_from_state("a.b", {"weight": torch.zeros(3, dtype=torch.uint8)}, 0, linear, CPU)


def test_runs_of_a_rotation_divide_the_inputs():
    assert [sdnq.rotation_of(inputs, 256) for inputs in (64, 192, 2432, 2)] == [64, 64, 128, 0]
    assert sdnq.rotation_of(64, 0) == 0
