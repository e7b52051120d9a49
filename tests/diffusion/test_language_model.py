"""The layers of a language model that are run give the hidden states of the whole model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.diffusion import text_encoders
from qzo_diffusion.diffusion.language_model import LanguageModel, chat_text, language_states
from qzo_diffusion.quant.entries import Entry
from qzo_diffusion.quant.load import handles_of
from qzo_diffusion.quant.stream import Quantization
from tests.small_pipeline import fill_, tokenizer

CPU = torch.device("cpu")
LAYERS = 3
SIZES = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "max_window_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
OPTIONS = {"dtype": torch.float32, "device": CPU}
TEXT = "<end>a red apple"


def qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True))


def qwen25_vl():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {"depth": 1, "hidden_size": 32, "num_heads": 1, "out_hidden_size": 64}
    text = SIZES | {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]}}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision | {"intermediate_size": 32})
    return Qwen2_5_VLForConditionalGeneration(config)


KINDS = {
    "qwen3": (qwen3, "Qwen3Model"),
    "qwen2.5-vl": (qwen25_vl, "Qwen2_5_VLTextModel"),
}


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    """The whole model, the folder of its pipeline, and the class of its layers."""
    make, class_name = KINDS[request.param]
    folder = tmp_path_factory.mktemp("model")
    model = fill_(make(), 1)
    model.save_pretrained(folder / "text_encoder")
    return model, folder, class_name


def words():
    return tokenizer(16, "", "<end>")


@torch.no_grad()
def whole_states(model, padded):
    padding = {"padding": "max_length"} if padded else {}
    found = words()(TEXT, max_length=16, truncation=True, return_tensors="pt", **padding)
    mask = found.attention_mask if padded else None
    return model(
        found.input_ids, attention_mask=mask, output_hidden_states=True, use_cache=False
    ).hidden_states


@pytest.mark.parametrize("states", [(1, 2), (-2,), (-1,)])
@pytest.mark.parametrize("padded", [False, True])
def test_states_are_those_of_the_whole_model(saved, states, padded):
    model, folder, class_name = saved
    kind = LanguageModel(class_name, states)
    reader = text_encoders.load_text_encoder(folder, "text_encoder", kind, **OPTIONS)
    (found,) = language_states(reader, words(), [TEXT], 16, padded)
    wanted = whole_states(model, padded)
    assert torch.equal(found, torch.cat([wanted[state] for state in states]))
    assert found.shape[1] == (16 if padded else len(words()(TEXT).input_ids))


def test_only_what_is_used_is_read_and_layers_are_in_4_bits(saved, monkeypatch):
    _, folder, class_name = saved
    read, own = [], Entry.read
    monkeypatch.setattr(Entry, "read", lambda entry: (read.append(entry.nbytes), own(entry))[1])
    kind = LanguageModel(class_name, (1,))
    reader = text_encoders.load_text_encoder(
        folder, "text_encoder", kind, quantization=Quantization(), **OPTIONS
    )
    used = text_encoders.read_encoder_entries(folder, "text_encoder", kind)
    assert sum(read) == sum(entry.nbytes for entry in used.values())
    assert {name.split(".")[2] for name in used} == {"0"}
    assert len(list(handles_of(reader))) == 7
    rest = {name for name, one in reader.named_parameters() if one.dim() > 1}
    assert all("proj" in name for name in rest)
    read.clear()
    (found,) = language_states(reader, words(), [TEXT], 16)
    assert sum(read) == len(set(words()(TEXT).input_ids)) * SIZES["hidden_size"] * 4
    assert found.isfinite().all()


def test_layers_that_are_not_used_may_be_missing(saved, tmp_path):
    _, folder, class_name = saved
    place = tmp_path / "text_encoder"
    place.mkdir()
    (place / "config.json").write_text((folder / "text_encoder/config.json").read_text())
    tensors = load_file(folder / "text_encoder/model.safetensors")
    kept = {name: one for name, one in tensors.items() if ".2." not in name}
    save_file(kept, place / "model.safetensors")
    text_encoders.load_text_encoder(
        tmp_path, "text_encoder", LanguageModel(class_name, (-2,)), **OPTIONS
    )
    with pytest.raises(ModelError, match="not in its files"):
        text_encoders.load_text_encoder(
            tmp_path, "text_encoder", LanguageModel(class_name, (-1,)), **OPTIONS
        )


def test_a_model_that_is_too_small_or_without_embedding_is_refused(tmp_path):
    place = tmp_path / "text_encoder"
    fill_(qwen3(), 1).save_pretrained(place)
    with pytest.raises(ModelError, match="num_hidden_layers"):
        text_encoders.read_encoder_entries(
            tmp_path, "text_encoder", LanguageModel("Qwen3Model", (9, 18))
        )
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    with pytest.raises(ModelError, match="token embedding"):
        text_encoders.read_encoder_entries(
            tmp_path, "text_encoder", LanguageModel("Qwen3Model", (-1,))
        )


def test_a_prompt_becomes_a_turn_of_a_chat():
    own = words()
    with pytest.raises(ModelError, match="chat template"):
        chat_text(own, "red")
    own.chat_template = (
        "{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}{% endfor %}"
        "{% if add_generation_prompt %}[model]{% endif %}{{ thinking }}"
    )
    assert chat_text(own, "red", thinking="...") == "[user]red[model]..."
