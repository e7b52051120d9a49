"""Weights in 8 bits whose scale lies beside them are multiplied, or refused; never used without."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.diffusion.families.sd3_layout import SD3_LAYOUT
from qzo_diffusion.diffusion.original_layout import PREFIX
from qzo_diffusion.diffusion.transformer import empty_transformer, find_transformer
from qzo_diffusion.quant.stream import fill_
from qzo_diffusion.quant.weights import Pending, read_entries, write_tensors
from tests.quant.test_stream import empty
from tests.small_models import causal_lm, sd3_transformer, t5_encoder

CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn


class Network(nn.Module):
    def __init__(self, rows=256, columns=320):
        super().__init__()
        self.layer = nn.Linear(columns, rows)
        self.word = nn.Embedding(3, 4)


def blocks_of(shape, block):
    """How many blocks of that many rows and columns lie in a weight, the last ones cut."""
    return tuple(-(-size // of) for size, of in zip(shape, block, strict=True))


def spread(scale, shape, block):
    """[A, B] -> a scale for each number of the weight."""
    whole = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return whole[: shape[0], : shape[1]]


def read(tmp_path, tensors, model=None):
    """Every tensor of a model filled from a file of these, in fp32."""
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = model or Network(*tensors["layer.weight"].shape)
    fill_(model, read_entries(tmp_path), None, dtype=torch.float32, device=CPU)
    return model.state_dict()


def coded(shape=(256, 320), dtype=FP8, seed=0):
    """Tensors of a Network: codes, and the rest as it is."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-100, 100, shape, generator=generator).float().to(dtype)
    return {
        "layer.weight": codes,
        "layer.bias": torch.ones(shape[0]),
        "word.weight": torch.ones(3, 4),
    }


@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("block", ["tensor", "flat", "row", "long_row", (128, 128), (1, 32)])
def test_codes_are_multiplied_by_their_scales(tmp_path, dtype, spelling, block):
    tensors = coded(dtype=dtype)
    shape = tuple(tensors["layer.weight"].shape)
    counts = {"tensor": (), "flat": (1,), "row": (shape[0],), "long_row": (shape[0], 1)}
    size = counts[block] if isinstance(block, str) else blocks_of(shape, block)
    scale = torch.rand(size, generator=torch.Generator().manual_seed(1)) + 0.5
    wide = spread(scale, shape, block) if not isinstance(block, str) else scale.view(-1, 1)
    state = read(tmp_path, tensors | {f"layer.{spelling}": scale})
    assert torch.equal(state["layer.weight"], tensors["layer.weight"].float() * wide)


def test_blocks_that_are_cut_at_the_edge_keep_their_place(tmp_path):
    """A block of DeepSeek has 128 rows, also where 320 rows are no multiple of it."""
    tensors, block = coded((320, 192)), (128, 128)
    scale = torch.rand(3, 2, generator=torch.Generator().manual_seed(1)) + 0.5
    state = read(tmp_path, tensors | {"layer.weight_scale_inv": scale})
    wanted = tensors["layer.weight"].float() * spread(scale, (320, 192), block)
    assert torch.equal(state["layer.weight"], wanted)


def description(**facts):
    return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)


def test_what_belongs_to_inputs_alone_is_left_out(tmp_path):
    beside = {
        "layer.weight_scale": torch.tensor(0.5),
        "layer.input_scale": torch.tensor(3.0),
        "layer.comfy_quant": description(format="float8_e4m3fn", full_precision_matrix_mult=True),
        "scaled_fp8": torch.zeros(0, dtype=FP8),
    }
    state = read(tmp_path, coded() | beside)
    assert torch.equal(state["layer.weight"], coded()["layer.weight"].float() * 0.5)


HALF = torch.tensor(0.5)
REFUSED = {
    "second scale": {"layer.weight_scale": HALF, "layer.weight_scale_2": HALF},
    "zero point": {"layer.weight_scale": HALF, "layer.weight_zero_point": torch.zeros(256)},
    "two spellings": {"layer.weight_scale": HALF, "layer.scale_weight": HALF},
    "another shape": {"layer.weight_scale": torch.ones(7)},
    "blocks of no size": {"layer.weight_scale": torch.ones(5, 3)},
    "columns": {"layer.weight_scale": torch.ones(1, 256)},
    "rotated": {
        "layer.weight_scale": HALF,
        "layer.comfy_quant": description(format="int8_tensorwise", convrot=True),
    },
    "unknown format": {
        "layer.weight_scale": HALF,
        "layer.comfy_quant": description(format="mxfp8"),
    },
    "damaged description": {
        "layer.weight_scale": HALF,
        "layer.comfy_quant": torch.zeros(9, dtype=torch.uint8),
    },
    "input alone": {"layer.input_scale": HALF},
    "packed scale": {"layer.weight_scale": torch.ones(256, 10, dtype=torch.uint8)},
    "low rank beside": {"layer.svd_up": torch.ones(256, 4)},
    "adapter inside": {"layer.lora_A.weight": torch.ones(4, 320)},
    "bias of a bias": {"layer.bias.scale": HALF},
}


@pytest.mark.parametrize("beside", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_understood_beside_a_weight_is_refused(tmp_path, beside):
    with pytest.raises(ModelError, match=r"layer\..*, a tensor beside layer"):
        read(tmp_path, coded() | beside)


def test_a_scale_of_a_weight_that_is_not_in_8_bits_is_refused(tmp_path):
    tensors = coded(dtype=torch.bfloat16) | {"layer.weight_scale": HALF}
    with pytest.raises(ModelError, match=r"layer\.weight_scale, a tensor beside layer"):
        read(tmp_path, tensors)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_refused(tmp_path, value):
    with pytest.raises(ModelError, match="not finite"):
        read(tmp_path, coded() | {"layer.weight_scale": torch.tensor(value)})


def test_a_file_that_lost_its_scales_is_refused(tmp_path):
    marker = {"scaled_fp8": torch.zeros(0, dtype=FP8)}
    with pytest.raises(ModelError, match=r"layer\.weight in 8 bits without a scale"):
        read(tmp_path, coded() | marker)


def test_plain_fp8_without_any_scale_stays_what_it_is(tmp_path):
    assert torch.equal(read(tmp_path, coded())["layer.weight"], coded()["layer.weight"].float())


def test_a_name_beside_nothing_is_only_unused(tmp_path):
    save_file(coded() | {"other.weight_scale": HALF}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = Network()
    filled = fill_(model, read_entries(tmp_path), None, dtype=torch.float32, device=CPU)
    assert filled.unused == ["other.weight_scale"]


def in_fp8(tensors, part, suffix, per_row=False):
    """Linear weights of a state whose name holds `part` in fp8, and what they stand for."""
    stored, plain = {}, {}
    for name, tensor in tensors.items():
        if part not in name or not name.endswith(".weight") or tensor.dim() != 2:
            stored[name] = plain[name] = tensor.clone()
            continue
        largest = tensor.abs().amax(1, keepdim=True) if per_row else tensor.abs().max()
        scale = largest / 448
        stored[name] = (tensor / scale).to(FP8)
        stored[name.removesuffix("weight") + suffix] = scale.clone()
        plain[name] = stored[name].float() * scale
    return stored, plain


@pytest.mark.parametrize("per_row", [False, True])
def test_fused_queries_keys_and_values_share_their_scale(tmp_path, per_row):
    """The original layout cuts them apart, and swaps the halves of the last modulation."""
    model = sd3_transformer()
    pending = {name: Pending.of(tensor) for name, tensor in model.state_dict().items()}
    write_tensors(tmp_path / "plain.safetensors", SD3_LAYOUT.to_original(pending, model.config), {})
    tensors = load_file(tmp_path / "plain.safetensors")
    wide = {name: tensor for name, tensor in tensors.items() if "_embed" not in name}
    stored, plain = in_fp8(wide, "", "scale_weight", per_row)
    others = {name: tensor for name, tensor in tensors.items() if "_embed" in name}
    marker = {f"{PREFIX}scaled_fp8": torch.zeros(0, dtype=FP8)}
    save_file(stored | others | marker, tmp_path / "fp8.safetensors")
    save_file(plain | others, tmp_path / "plain.safetensors")
    states = []
    for name in ("fp8", "plain"):
        found = find_transformer(tmp_path / f"{name}.safetensors")
        filled = empty_transformer(found.config)
        fill_(filled, found.entries, None, dtype=torch.float32, device=CPU)
        states.append(filled.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_a_scale_that_the_original_layout_does_not_know_is_refused(tmp_path):
    model = sd3_transformer()
    pending = {name: Pending.of(tensor) for name, tensor in model.state_dict().items()}
    beside = f"{PREFIX}joint_blocks.1.x_block.attn.qkv.weight_scale_2"
    tensors = SD3_LAYOUT.to_original(pending, model.config) | {beside: Pending.of(torch.ones(1))}
    write_tensors(tmp_path / "file.safetensors", tensors, {})
    found = find_transformer(tmp_path / "file.safetensors")
    empty_model = empty_transformer(found.config)
    with pytest.raises(ModelError, match=r"attn\.to_q\.weight_scale_2"):
        fill_(empty_model, found.entries, None, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("make", [t5_encoder, lambda: causal_lm("llama")], ids=["t5", "llama"])
def test_text_encoders_and_language_models_have_their_scales(tmp_path, make):
    model = make()
    stored, plain = in_fp8(model.state_dict(), "layer", "weight_scale")
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    filled = empty(model)
    fill_(filled, read_entries(tmp_path), None, dtype=torch.float32, device=CPU)
    read_back = filled.state_dict()
    assert all(torch.equal(read_back[name], tensor) for name, tensor in plain.items())


def test_layers_that_the_config_does_not_have_are_refused(tmp_path):
    model = t5_encoder()
    model.save_pretrained(tmp_path)
    model.config.num_layers = 1
    with pytest.raises(ModelError, match="a layer that the model's config does not have"):
        fill_(empty(model), read_entries(tmp_path), None, dtype=torch.float32, device=CPU)
