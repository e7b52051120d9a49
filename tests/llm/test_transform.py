"""Maps that are merged into weights and applied online: the model computes what it did."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.llm import flatquant, kurtail
from qzo_diffusion.llm.decoder import decoder_of
from qzo_diffusion.llm.transform import install_, transformed_entries
from qzo_diffusion.quant.hadamard import cosines, hadamard_map, paley
from qzo_diffusion.quant.kronecker import KroneckerMap
from qzo_diffusion.quant.stream import fill_
from qzo_diffusion.quant.weights import read_entries
from qzo_diffusion.runs.llm.transforms import hadamard

SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 0,
}
KINDS = {
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "untied, with biases": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, tie_word_embeddings=False, attention_bias=True, mlp_bias=True)
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False)),
}
IDS = torch.arange(20).view(2, 10)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def in_float64(norm, hidden):
    """A norm of transformers, which itself computes in fp32."""
    return norm.weight * hidden * (hidden.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


@pytest.fixture(autouse=True)
def wide_norms(monkeypatch):
    for kind in (LlamaRMSNorm, Qwen2RMSNorm):
        monkeypatch.setattr(kind, "forward", in_float64)


def random_model(kind):
    """In float64; gains and biases are random too."""
    model = KINDS[kind]().double().eval()
    generator = torch.Generator().manual_seed(0)
    for _, parameter in sorted(model.named_parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
        if parameter.dim() == 1:
            parameter.add_(1)
    return model


def saved(model, folder):
    model.save_pretrained(folder)
    return read_entries(folder)


def transformed(kind, entries, transform, dtype=torch.float64):
    model = KINDS[kind]().to("meta", dtype)
    model.model.rotary_emb = KINDS[kind]().model.rotary_emb
    fill_(
        model,
        transformed_entries(entries, transform),
        None,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    install_(model, transform, dtype)
    return model


def sizes_of(model, kind):
    return decoder_of(model, tied=kind == "tied")


def rotations(model, kind):
    return hadamard(sizes_of(model, kind))


def any_rotations(model, kind):
    """As KurTail learns them: an orthogonal matrix of the stream, and one of each block's heads."""
    sizes = sizes_of(model, kind)
    widths = {kurtail.RESIDUAL: 24} | {f"heads.{block}": 6 for block in range(sizes.blocks)}
    return kurtail.transform(
        sizes, {name: torch.linalg.qr(drawn(size, size)).Q for name, size in widths.items()}
    )


def any_maps(model, kind):
    """As FlatQuant learns them: not orthogonal, for every place."""
    sizes, parts = sizes_of(model, kind), {}
    for site in flatquant.sites(sizes):
        size = model.get_submodule(site.layers[0]).in_features
        parts[f"{site.module}.scale"] = drawn(size).exp()
        parts[f"{site.module}.left"] = torch.eye(size // 6) + 0.2 * drawn(size // 6, size // 6)
        parts[f"{site.module}.right"] = torch.eye(6) + 0.1 * drawn(6, 6)
    return flatquant.transform(sizes, parts)


def drawn(*shape):
    seed = torch.Generator().manual_seed(len(shape))
    return torch.randn(*shape, generator=seed, dtype=torch.float64)


def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("maps", [rotations, any_rotations, any_maps])
@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_is_the_same_in_float64(kind, maps, tmp_path):
    model = random_model(kind)
    transform = maps(model, kind)
    changed = transformed(kind, saved(model, tmp_path), transform)
    before, after = logits(model), logits(changed)
    assert before.std() > 0.1
    torch.testing.assert_close(after, before, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_in_a_block_is_another_one(kind, tmp_path):
    model = random_model(kind)
    changed = transformed(kind, saved(model, tmp_path), rotations(model, kind))
    for name, after in changed.named_parameters():
        if "layers" not in name:
            continue
        if "norm" in name:
            assert (after == 1).all(), name
        elif name.endswith(".weight"):
            assert (after - model.get_parameter(name)).abs().mean() > 0.05, name


def test_a_weight_that_embedding_and_head_share_stays_one(tmp_path):
    model = random_model("tied")
    changed = transformed("tied", saved(model, tmp_path), rotations(model, "tied"))
    assert changed.lm_head.weight is changed.model.embed_tokens.weight
    assert torch.equal(changed.lm_head.weight, model.lm_head.weight)


def test_a_large_input_is_spread(tmp_path):
    """A channel that is always large is no longer so for the layers behind the rotation."""
    model = random_model("tied")
    model.model.embed_tokens.weight[:, 3] += 50
    changed = transformed("tied", saved(model, tmp_path), rotations(model, "tied"))

    def peak(one):
        seen = []
        one.model.layers[0].mlp.gate_proj.register_forward_pre_hook(
            lambda _, args: seen.append(args[0])
        )
        logits(one)
        return (seen[0].abs().amax(-1) / seen[0].square().mean(-1).sqrt()).mean()

    for norm in (layer.post_attention_layernorm for layer in model.model.layers):
        norm.weight.fill_(1)
    assert peak(changed) < 0.6 * peak(model)


@pytest.mark.parametrize("size", [1, 2, 8, 12, 24, 36, 64, 576, 1536])
def test_hadamard_matrices_are_orthogonal_with_even_entries(size):
    full = hadamard_map(size).of(torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(
        full @ full.T, torch.eye(size, dtype=torch.float64), atol=1e-12, rtol=0
    )
    torch.testing.assert_close(full.abs(), torch.full_like(full, size**-0.5), atol=1e-12, rtol=0)


def test_a_width_without_a_hadamard_matrix_is_rotated_too():
    full = hadamard_map(43 * 4).of(torch.eye(172, dtype=torch.float64))
    assert paley(172) is None
    torch.testing.assert_close(
        full @ full.T, torch.eye(172, dtype=torch.float64), atol=1e-12, rtol=0
    )
    assert full.abs().max() <= (2 / 172) ** 0.5 + 1e-12


def test_a_map_and_what_weights_take_cancel():
    one = KroneckerMap(drawn(6).exp(), drawn(2, 2), cosines(3) + 0.1 * drawn(3, 3))
    x, weight = drawn(5, 6), drawn(4, 6)
    found = one.of(x) @ one.dual().of_rows(weight).T
    torch.testing.assert_close(found, x @ weight.T, atol=1e-10, rtol=0)


def test_another_kind_of_model_is_refused():
    model = KINDS["tied"]()
    model.config.model_type = "gemma2"
    with pytest.raises(ModelError, match="of the kind gemma2"):
        decoder_of(model, tied=True)
