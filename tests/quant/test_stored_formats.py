"""LLM.int8, GPTQ, AQLM, HQQ, GGUF under one contract each: codes stay, scales are live and fp32,
and what was tuned is saved.
"""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.core.noise import directions_of_step
from qzo_diffusion.core.optimizer import Sgd
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.core.probing import Probing, StepBatch
from qzo_diffusion.llm.causal_lm import load_causal_lm
from qzo_diffusion.llm.stored import save_stored
from qzo_diffusion.quant import aqlm, gguf, gptq, hqq
from qzo_diffusion.quant.load import codes_fingerprint, find_scales, handles_of, quantize_
from qzo_diffusion.train.loop import Setup, train
from tests.quant.stored_formats import aqlm_state, convert_folder, gptq_state, hqq_state
from tests.quantized import assert_same, inputs, snapshot, squared_output
from tests.tiny_llama import save_tiny_llama

WIDTH = 128
GPTQ = {"gptq": {}, "gptq act order": {"act_order": True}, "gptq asymmetric": {"symmetric": False}}
# 12 bits in 16: a codebook of a test's size
AQLM = {"aqlm 2x8": {}, "aqlm 1x16": {"books": 1, "bits": 12}}
HQQ = {
    "hqq": {},
    "hqq 2 bits": {"bits": 2},
    "hqq 8 bits": {"bits": 8},
    "hqq as float": {"as_float": True},
}
GGUF = ["gguf Q4_0", "gguf Q4_1", "gguf Q8_0"]
FORMATS = ["int8", *GPTQ, *AQLM, *HQQ, *GGUF]


def layer_of(kind, weight, bias):
    if kind == "int8":
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.weight.data, linear.bias.data = weight, bias
        holder = nn.Sequential(linear)
        quantize_(holder, quant_type="int8")
        return holder[0]
    if kind in GPTQ:
        return gptq.layer_from_state("layer", gptq_state(weight, **GPTQ[kind])[0], bias, 1)
    if kind in GGUF:
        package, kind = pytest.importorskip("gguf"), kind.split()[1]
        blocks = package.quants.quantize(weight.numpy(), package.GGMLQuantizationType[kind])
        return gguf.GgufLinear(torch.from_numpy(blocks), kind, torch.arange(len(weight)), bias)
    if kind in HQQ:
        return hqq.layer_from_state("layer", hqq_state(weight, **HQQ[kind])[0], bias)
    return aqlm.layer_from_state("layer", aqlm_state(weight, **AQLM[kind])[0], bias)


def network(kind, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def layer(outputs):
        weight = torch.randn(outputs, WIDTH, generator=generator) / WIDTH**0.5
        return layer_of(kind, weight, torch.randn(outputs, generator=generator))

    model = nn.Sequential(layer(WIDTH), nn.Tanh(), layer(8)).eval()
    for module in model.modules():  # as a model in that dtype holds them; scales stay
        for name in ("bias", "codebooks"):
            if isinstance(getattr(module, name, None), torch.Tensor):
                getattr(module, name).data = getattr(module, name).data.to(dtype)
    return model


@pytest.mark.parametrize("kind", FORMATS)
def test_scales_are_fp32_live_and_linear(kind):
    model = network(kind)
    scales = find_scales(model)
    assert {scales[name].dtype for name in scales} == {torch.float32}
    for handle in handles_of(model):
        handle.module.bias.data.zero_()
    with torch.no_grad():
        before = model[0](inputs())
        scales[next(iter(scales))].mul_(2.0)
        assert torch.equal(model[0](inputs()), 2 * before)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_is_that_of_the_dequantized_weight(kind, dtype):
    model = network(kind, dtype)
    x = inputs(dtype=dtype)
    order = getattr(model[0], "order", torch.arange(WIDTH))
    handle = next(iter(handles_of(model)))
    wide = x.float()[:, order]
    with torch.no_grad():
        exact = wide @ handle.dequantized().float().t() + handle.module.bias.float()
        bound = (
            wide.abs() @ handle.dequantized().float().abs().t() + handle.module.bias.float().abs()
        )
        found = model[0](x).float()
    # Weight, product and output are each rounded once or twice to the dtype, and sums of 128 terms
    # are in fp32.
    unit = {torch.float32: 2**-24, torch.bfloat16: 2**-9}[dtype]
    assert ((found - exact).abs() <= bound * (6 * unit + 2 * WIDTH * 2**-24)).all()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("level", ["dense", "row", "separable"])
def test_training_moves_scales_and_nothing_else(kind, level):
    model = network(kind)
    scales = find_scales(model)
    with torch.no_grad():
        model(inputs())  # whatever a first forward does to a layer
    before, codes = snapshot(model, scales), codes_fingerprint(model)
    theta, objective = parametrize(scales, level), squared_output(model)
    start = objective(inputs()).mean().item()
    probing = Probing(seed=0, eps=1e-2, per_example=level != "dense")
    batch = StepBatch([inputs()])
    train(Setup(objective, lambda _: batch, theta, Sgd(), probing, lambda _: 0.05), max_steps=20)
    theta.merge_()
    assert objective(inputs()).mean().item() < start
    assert codes_fingerprint(model) == codes
    after = snapshot(model, scales)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {
        name for name in before if name.startswith("scales.") or name.endswith((".scales", "SCB"))
    }


@pytest.mark.parametrize("kind", FORMATS)
def test_what_was_shown_is_put_back_bit_for_bit(kind):
    model = network(kind)
    scales = find_scales(model)
    with torch.no_grad():
        plain = model(inputs())
        before = snapshot(model, scales)
        with scales.override(lambda names: {name: scales[name] * 1.1 for name in names}):
            assert not torch.equal(model(inputs()), plain)
        assert_same(before, snapshot(model, scales))
        assert torch.equal(model(inputs()), plain)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("level", ["row", "column", "separable"])
def test_factors_of_inputs_and_outputs_are_those_of_scales(kind, level):
    model = network(kind)
    theta = parametrize(find_scales(model), level)
    (direction,) = directions_of_step(0, 0, 1, "rademacher")
    with torch.no_grad():
        with theta.scales.override(theta.perturbed(direction, 0.1)):
            viewed = model(inputs())
        with theta.scales.override(*theta.probes([direction, direction], [0.1])):
            # two groups, of equal directions
            gained = model(inputs())
    torch.testing.assert_close(viewed, gained, rtol=1e-4, atol=1e-5)


def test_int8_keeps_inputs_whole_after_eval_and_a_copy():
    """In eval mode bitsandbytes rounds the inputs to int8: about 1 % of the output, where a probe
    changes as much.
    """
    model = copy.deepcopy(network("int8")).eval()
    scales = find_scales(model)
    with torch.no_grad():
        weight = next(iter(handles_of(model))).dequantized()
        exact = inputs() @ weight.t() + model[0].bias
        torch.testing.assert_close(model.eval()[0](inputs()), exact, rtol=1e-5, atol=1e-5)
        scales["0"].mul_(1 + 1e-4)
        moved = inputs() @ (weight * (1 + 1e-4)).t() + model[0].bias
        torch.testing.assert_close(model[0](inputs()) - exact, moved - exact, rtol=0.05, atol=1e-6)


def test_an_8_bit_layer_that_was_never_moved_is_refused():
    import bitsandbytes

    with pytest.raises(ModelError, match="not quantized yet"):
        find_scales(nn.Sequential(bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False)))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32))
def test_packing_is_undone_by_unpacking(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (8 * rows, 8 * columns), generator=generator).to(torch.uint8)
    for dim in (0, 1):
        assert torch.equal(gptq.unpack(gptq.pack(codes, dim), dim), codes)


def test_words_are_laid_out_as_in_files():
    """The first of eight inputs in the lowest bits; the sign bit belongs to the last."""
    codes = torch.arange(8, 16, dtype=torch.uint8).view(8, 1)
    word = sum(int(code) << (4 * place) for place, code in enumerate(codes))
    assert gptq.pack(codes, 0).item() == word - 2**32


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("label", ["gptq", "gptq_v2", None])
def test_a_symmetric_file_tells_its_version_whatever_the_label(version, label):
    state, _ = gptq_state(
        torch.randn(8, 32, generator=torch.Generator().manual_seed(0)), version=version
    )
    assert gptq.version_of({"layer": state["qzeros"]}, label) == version


def test_an_asymmetric_file_is_believed():
    state, _ = gptq_state(
        torch.randn(8, 32, generator=torch.Generator().manual_seed(0)), symmetric=False
    )
    assert gptq.version_of({"layer": state["qzeros"]}, "gptq_v2") == 2
    assert gptq.version_of({"layer": state["qzeros"]}, "gptq") == 1


def test_parts_that_do_not_fit_are_refused():
    state, _ = gptq_state(torch.randn(8, 32, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ModelError, match="no 4-bit GPTQ layer"):
        gptq.layer_from_state("layer", state | {"scales": state["scales"][:, :4]}, None, 1)
    with pytest.raises(ModelError, match="groups of different sizes"):
        gptq.layer_from_state(
            "layer", state | {"g_idx": torch.zeros(32, dtype=torch.int32)}, None, 1
        )
    state, _ = aqlm_state(torch.randn(8, 32, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ModelError, match="no AQLM layer"):
        aqlm.layer_from_state("layer", state | {"scales": state["scales"][:4]}, None)


@pytest.mark.parametrize(
    "change",
    [
        {"axis": torch.tensor(0)},
        {"packing": torch.tensor(list(b"3bit_32"), dtype=torch.uint8)},
        {"scale": torch.ones(4, 1)},
        {"zero": torch.ones(1, 1)},
        {"shape": torch.tensor([64, 4])},  # groups of 16 cross its rows
        {"shape": torch.tensor([8])},
        {"W_q": torch.zeros(1, 16, dtype=torch.uint8)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_hqq_layer_that_is_not_read_is_refused(change):
    state, _ = hqq_state(torch.randn(8, 32, generator=torch.Generator().manual_seed(0)))
    hqq.layer_from_state("layer", state, None)
    with pytest.raises(ModelError, match="layer is no HQQ layer that is read"):
        hqq.layer_from_state("layer", state | change, None)
    del state[next(iter(change))]
    with pytest.raises(ModelError, match="layer is no HQQ layer that is read"):
        hqq.layer_from_state("layer", state, None)


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("plain") / "model")


def logits(lm):
    with torch.no_grad():
        return lm.model(input_ids=torch.arange(12).view(1, -1)).logits


CASES = {
    "gptq": ("gptq", {}, {}),
    "gptq labelled wrong": ("gptq", {"checkpoint_format": "gptq"}, {"version": 2}),
    "gptq act order": ("gptq", {"desc_act": True}, {"act_order": True}),
    "aqlm": ("aqlm", {}, {}),
    "hqq": ("hqq", {}, {}),
    "hqq 2 bits": ("hqq", {}, {"bits": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_stored_llama_is_read_tuned_and_saved(plain_folder, tmp_path, case):
    method, settings, options = CASES[case]
    weights = convert_folder(plain_folder, tmp_path / "stored", method, settings, **options)
    lm = load_causal_lm(tmp_path / "stored", torch.float32)
    reference = load_causal_lm(plain_folder, torch.float32)
    for name, weight in weights.items():
        reference.model.get_submodule(name).weight.data = weight
    # Two layers; logits of about 1 from sums of up to 128 terms in fp32.
    torch.testing.assert_close(logits(lm), logits(reference), rtol=1e-4, atol=1e-4)

    scales, codes = find_scales(lm.model), codes_fingerprint(lm.model)
    assert len(scales) == len(weights)
    before = logits(lm)
    for index, name in enumerate(scales):
        # what the file can hold
        scales[name].mul_(1 + 0.01 * (index % 3)).copy_(scales[name].half().float())
    tuned = logits(lm)
    assert not torch.equal(tuned, before)
    (tmp_path / "saved").mkdir()
    save_stored(tmp_path / "stored", tmp_path / "saved", scales)
    again = load_causal_lm(tmp_path / "saved", torch.float32)
    assert torch.equal(logits(again), tuned)
    assert codes_fingerprint(again.model) == codes
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("stored", "saved"))
    assert {name: one.dtype for name, one in old.items()} == {
        name: one.dtype for name, one in new.items()
    }
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert all(name.endswith(".scale" if method == "hqq" else ".scales") for name in changed)


def test_a_folder_of_other_bits_is_refused(plain_folder, tmp_path):
    convert_folder(plain_folder, tmp_path / "stored", "gptq", {"bits": 3})
    with pytest.raises(ModelError, match="GPTQ of 3 bits"):
        load_causal_lm(tmp_path / "stored", torch.float32)


def test_scales_of_another_model_are_not_saved(plain_folder, tmp_path):
    convert_folder(plain_folder, tmp_path / "stored", "aqlm")
    (tmp_path / "saved").mkdir()
    with pytest.raises(ModelError, match=r"without model\.nothing\.scales"):
        save_stored(tmp_path / "stored", tmp_path / "saved", {"model.nothing": torch.ones(64)})


def test_aqlm_is_read_as_its_own_package_reads_it():
    utils = pytest.importorskip(
        "aqlm.utils", reason="aqlm is not installed: 350 MB with its dependencies"
    )
    for kind, options in AQLM.items():
        state, _ = aqlm_state(
            torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(0)), **options
        )
        codes = utils.unpack_int_data(state["codes"], options.get("bits", 8))
        theirs = utils._dequantize_weight(codes, state["codebooks"], state["scales"].float())
        ours = next(
            iter(handles_of(nn.Sequential(aqlm.layer_from_state("layer", state, None))))
        ).dequantized()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, msg=kind)


def test_gptq_is_read_as_its_own_package_reads_it(plain_folder, tmp_path):
    pytest.importorskip(
        "gptqmodel",
        reason="gptqmodel is not installed: 340 MB, and it compiles C++ in its first forward",
    )
    from transformers import AutoModelForCausalLM, GPTQConfig

    convert_folder(
        plain_folder,
        tmp_path / "stored",
        "gptq",
        {"checkpoint_format": "gptq", "sym": True, "desc_act": False},
    )
    settings = GPTQConfig(bits=4, group_size=16, backend="torch")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "stored", quantization_config=settings, dtype=torch.float32
    )
    with torch.no_grad():
        wanted = theirs(input_ids=torch.arange(12).view(1, -1)).logits
    torch.testing.assert_close(
        logits(load_causal_lm(tmp_path / "stored", torch.float32)), wanted, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_hqq_is_read_as_its_own_package_reads_it(bits):
    package = pytest.importorskip(
        "hqq.core.quantize",
        reason="hqq is not installed: it builds CUDA code where it finds a compiler",
    )
    linear = nn.Linear(WIDTH, 8)
    settings = package.BaseQuantizeConfig(nbits=bits, group_size=16, axis=1)
    theirs = package.HQQLinear(
        linear, settings, compute_dtype=torch.float32, device="cpu", del_orig=False
    )
    ours = hqq.layer_from_state("layer", theirs.state_dict(), None).dequantized()
    torch.testing.assert_close(ours, theirs.dequantize().float(), rtol=1e-6, atol=1e-6)
