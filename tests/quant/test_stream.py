"""Streaming gives bit for bit what loading the whole model and quantizing it gives, for every kind
of model and place.
"""

import pytest
import torch
from torch import nn

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.quant.load import find_scales, quantize_
from qzo_diffusion.quant.stored import pending_dequantized, pending_tensors
from qzo_diffusion.quant.stream import Quantization, fill_
from qzo_diffusion.quant.weights import read_entries, write_tensors
from qzo_diffusion.quant.without_weights import without_weights
from tests.small_models import causal_lm, sd3_inputs, sd3_transformer, t5_encoder

CPU = torch.device("cpu")
SKIP = ("proj_out", "lm_head", "pos_embed", "embed_out")
KINDS = ["large", "medium", "sd3", "llama", "qwen2_tied", "opt", "gpt_neox", "t5"]


def make(kind):
    if kind in ("large", "medium", "sd3"):
        return sd3_transformer(kind)
    return t5_encoder() if kind == "t5" else causal_lm(kind)


def empty(model):
    """The same model without memory; transformers computes some buffers when it builds, so those
    are real.
    """
    if hasattr(model, "all_tied_weights_keys"):
        with without_weights():
            return type(model)(model.config)
    with torch.device("meta"):
        return type(model).from_config(model.config)


def assert_same_model(one, other):
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name
    for name, buffer in other.named_buffers():
        assert torch.equal(buffer, one.get_buffer(name)), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", ["100GB", "50KB"])
def test_streamed_equals_loaded_whole_and_then_quantized(tmp_path, kind, shards):
    model = make(kind)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "50KB")
    streamed = empty(model)
    read: list[int] = []
    entries = read_entries(tmp_path)
    filled = fill_(
        streamed,
        entries,
        Quantization(skip=SKIP),
        dtype=torch.bfloat16,
        device=CPU,
        progress=read.append,
    )
    whole = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    count = quantize_(whole, skip=SKIP)
    assert (filled.quantized, filled.taken_over, filled.unused) == (count, 0, [])
    assert sum(read) == sum(entry.nbytes for entry in entries.values())
    assert_same_model(streamed, whole)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["medium", "llama"])
def test_a_4_bit_folder_is_taken_over_code_by_code(tmp_path, kind, nested):
    """Saved by the library itself from bitsandbytes layers, with or without double quantization."""
    import bitsandbytes

    model = make(kind)
    for name, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and linear.in_features % 64 == 0:
            layer = bitsandbytes.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                linear.bias is not None,
                compress_statistics=nested,
                quant_type="nf4",
            )
            layer.load_state_dict(linear.state_dict())
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.to("cpu"))
    from safetensors.torch import save_file

    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert any("nested" in name for name in state) == nested
    save_file(state, tmp_path / "model.safetensors")
    streamed = empty(make(kind))
    filled = fill_(
        streamed,
        read_entries(tmp_path),
        Quantization(blocksize=128),
        dtype=torch.float32,
        device=CPU,
    )
    assert filled.quantized == 0
    scales = find_scales(model)  # un-nests the original
    assert filled.taken_over == len(scales)
    assert_same_model(streamed, model)
    assert all(torch.equal(find_scales(streamed)[name], scales[name]) for name in scales)


def test_the_reference_back_end_takes_over_the_same_codes(tmp_path):
    model = sd3_transformer()
    quantize_(model, skip=SKIP)
    write_tensors(tmp_path / "model.safetensors", pending_tensors(model), {})
    streamed = empty(sd3_transformer())
    how = Quantization(backend="reference", skip=SKIP)
    fill_(streamed, read_entries(tmp_path), how, dtype=torch.float32, device=CPU)
    x = sd3_inputs(model)
    assert torch.allclose(streamed(**x).sample, model(**x).sample, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_is_read_back_bit_for_bit(tmp_path, kind):
    model = make(kind)
    quantize_(model, skip=SKIP)
    write_tensors(tmp_path / "model.safetensors", pending_tensors(model), {})
    streamed = empty(make(kind))
    fill_(
        streamed, read_entries(tmp_path), Quantization(skip=SKIP), dtype=torch.float32, device=CPU
    )
    assert_same_model(streamed, model)


def test_dequantized_tensors_are_those_of_the_plain_model(tmp_path):
    """Through the file and the plain library: outputs equal those of the 4-bit layers."""
    model = sd3_transformer("medium")
    quantize_(model, skip=SKIP)
    write_tensors(
        tmp_path / "diffusion_pytorch_model.safetensors",
        pending_dequantized(model, torch.float32),
        {},
    )
    model.save_config(tmp_path)
    plain = type(model).from_pretrained(tmp_path)
    x = sd3_inputs(model)
    assert torch.allclose(plain(**x).sample, model(**x).sample, atol=1e-5)


def test_a_tensor_that_is_missing_is_named(tmp_path):
    model = sd3_transformer()
    model.save_pretrained(tmp_path)
    entries = read_entries(tmp_path)
    del entries["transformer_blocks.1.ff.net.2.bias"]
    with pytest.raises(ModelError, match=r"transformer_blocks\.1\.ff\.net\.2\.bias"):
        fill_(empty(model), entries, Quantization(skip=SKIP), dtype=torch.float32, device=CPU)


def test_weights_of_another_shape_are_named(tmp_path):
    sd3_transformer().save_pretrained(tmp_path)
    other = causal_lm("llama")
    other.save_pretrained(tmp_path / "lm")
    entries = read_entries(tmp_path / "lm")
    with pytest.raises(ModelError, match="tensors of the model are not in its files"):
        fill_(
            empty(sd3_transformer()),
            entries,
            Quantization(skip=SKIP),
            dtype=torch.float32,
            device=CPU,
        )
    entries = read_entries(tmp_path)
    entries["proj_out.weight"] = entries["context_embedder.weight"]
    with pytest.raises(ModelError, match=r"proj_out\.weight has the shape \(128, 64\)"):
        fill_(
            empty(sd3_transformer()),
            entries,
            Quantization(skip=SKIP),
            dtype=torch.float32,
            device=CPU,
        )


@pytest.mark.parametrize("missing", ["quant_map", "quant_state.bitsandbytes__nf4"])
def test_a_4_bit_layer_that_lacks_a_part_is_named(tmp_path, missing):
    model = sd3_transformer()
    quantize_(model, skip=SKIP)
    write_tensors(tmp_path / "model.safetensors", pending_tensors(model), {})
    entries = read_entries(tmp_path)
    del entries[f"transformer_blocks.0.attn.to_q.weight.{missing}"]
    with pytest.raises(
        ModelError, match=r"transformer_blocks\.0\.attn\.to_q is not a whole 4-bit layer"
    ):
        fill_(
            empty(sd3_transformer()),
            entries,
            Quantization(skip=SKIP),
            dtype=torch.float32,
            device=CPU,
        )


def test_a_bare_language_model_fits_under_its_head(tmp_path):
    model = causal_lm("qwen2_tied")
    model.model.save_pretrained(tmp_path)
    streamed = empty(model)
    fill_(streamed, read_entries(tmp_path), None, dtype=torch.float32, device=CPU)
    assert_same_model(streamed, model)
    assert streamed.lm_head.weight is streamed.model.embed_tokens.weight


def test_nothing_to_quantize_is_an_error(tmp_path):
    model = sd3_transformer()
    model.save_pretrained(tmp_path)
    how = Quantization(
        skip=("transformer_blocks", *SKIP, "time_text_embed", "context_embedder", "norm_out")
    )
    with pytest.raises(ModelError, match="no linear layer"):
        fill_(empty(model), read_entries(tmp_path), how, dtype=torch.float32, device=CPU)
