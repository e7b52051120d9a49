"""Answers that a model generates: where they end, and how they are measured."""

import json

import pytest
import torch
from transformers import LlamaForCausalLM, OPTConfig, OPTForCausalLM

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.llm.causal_lm import CausalLm, load_causal_lm, padded
from qzo_diffusion.llm.objectives import (
    exact_match,
    task_metric,
    word_f1,
)
from qzo_diffusion.llm.tasks import encode, make_batch
from tests.llm.small_tasks import FACTS, examples_of
from tests.quant.stored_formats import convert_folder
from tests.tiny_llama import save_tiny_llama, tiny_llama, tokenizer


@pytest.fixture(scope="module")
def lm():
    return tiny_llama()


def test_greedy_answers_stop_and_are_measured(tmp_path, lm):
    spec, examples = examples_of(
        tmp_path,
        "squad",
        FACTS["squad"][0],
        FACTS["squad"][0] | {"context": "a much longer one, it rains"},
    )
    batch = make_batch(lm, encode(lm, examples, None))
    said = lm.answers(batch.prompts, batch.prompt_mask, 5, "")
    for text, example in zip(said, examples, strict=True):
        ids = lm.encode(example.prompt)
        for _ in range(5):
            ids.append(int(lm.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert text == lm.tokenizer.decode(ids[-5:], skip_special_tokens=True).strip()
    assert task_metric(lm, batch, spec, "f1").shape == (2,)


def test_greedy_answers_do_not_obey_what_came_with_the_model(tmp_path):
    """Penalties and beams would; where an answer ends is still the model's to say, also of a folder
    with codes.
    """
    folder = save_tiny_llama(tmp_path / "plain")
    convert_folder(folder, tmp_path / "stored", "gptq")
    told = {
        "eos_token_id": [0, 7],
        "repetition_penalty": 1.7,
        "num_beams": 4,
        "return_dict_in_generate": True,
    }
    for one in (folder, tmp_path / "stored"):
        wanted = said_by(load_causal_lm(one, torch.float32))
        (one / "generation_config.json").write_text(json.dumps(told))
        lm = load_causal_lm(one, torch.float32)
        settings = lm.model.generation_config
        assert settings.eos_token_id == [0, 7]
        settings.eos_token_id = 0
        assert said_by(lm) == wanted


def said_by(lm):
    ids = [lm.encode(text) for text in ("a film good It was", "answer Yes red green red green")]
    return lm.answers(
        padded(ids, 0, left=True), padded([[1] * len(one) for one in ids], 0, left=True), 12, ""
    )


def test_answers_end_where_the_positions_end(tmp_path):
    """OPT looks positions up in a table.

    A prompt that has room is not cut for one beside it that has none.
    """
    words = tokenizer()
    config = OPTConfig(
        vocab_size=len(words), hidden_size=32, ffn_dim=32, num_hidden_layers=1,
        num_attention_heads=2, word_embed_proj_dim=32,
        max_position_embeddings=32, pad_token_id=0, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    lm = CausalLm(OPTForCausalLM(config).eval(), words)
    lm.model.generation_config.eos_token_id = None
    long, short = lm.encode(" film" * 30), lm.encode(" red")
    said = lm.answers(
        padded([short, long], 0, left=True), padded([[1], [1] * 30], 0, left=True), 8, ""
    )
    alone = lm.answers(torch.tensor([short]), torch.ones(1, 1, dtype=torch.int64), 8, "")
    assert said[0] == alone[0]
    # Not the length of the text: half of a letter is one token that is said and three that are
    # read.
    assert (
        said[1]
        == lm.answers(
            torch.tensor([long]), torch.ones(1, 30, dtype=torch.int64), lm.context - 30, ""
        )[0]
    )


def test_a_padding_token_that_the_model_lacks_is_not_used():
    lm = tiny_llama()
    lm.tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert lm.tokenizer.pad_token_id == lm.head.out_features
    assert lm.padding == lm.tokenizer.eos_token_id
    lm.tokenizer.eos_token = None
    assert lm.padding == 0


@pytest.mark.parametrize("name", ["lm_head_multiplier", "logits_soft_cap"])
def test_settings_that_change_logits_are_known(name):
    model = LlamaForCausalLM(tiny_llama().model.config)
    setattr(model.config, name, 0.5)
    with pytest.raises(ModelError, match=name):
        CausalLm(model, tokenizer())


def test_f1_and_exact_match_are_those_of_squad():
    assert word_f1("The red film.", "red film") == 1.0
    assert word_f1("a red green film", "red film") == pytest.approx(2 * 2 / (3 + 2))
    assert word_f1("", "red") == word_f1("blue", "red") == 0.0
    assert exact_match("The Red Film!", "red film") == 1.0
    assert exact_match("red films", "red film") == 0.0
