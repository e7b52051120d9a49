"""The examples of a step of rewards: from seed and step alone, and shared by ranks."""

import pytest
import torch

from qzo_diffusion.config.files import make_config
from qzo_diffusion.core.errors import ConfigError
from qzo_diffusion.diffusion.encoded_prompt import EncodedPrompt
from qzo_diffusion.diffusion.prompts import Prompt
from qzo_diffusion.rewards.pictures import PictureBatch
from qzo_diffusion.runs.style.reward_batches import RewardBatches
from qzo_diffusion.train.distributed import Ranks

PROMPTS = [Prompt("apple"), Prompt("pear", negative="rust"), Prompt("plum")]
SETTINGS = {"reward": {"scores": ["brightness"]}, "data": {"batch_size": 3}}


def encoded(text):
    value = float(len(text))
    return EncodedPrompt(torch.full((2, 4), value), torch.full((4,), value), 1, False)


ENCODED = {text: encoded(text) for text in ("apple", "pear", "plum", "rust", "")}


def batches(ranks=None, **settings):
    config = make_config({**SETTINGS, **settings})
    shape, cpu = (16, 2, 2), torch.device("cpu")
    return RewardBatches(config, PROMPTS, ENCODED, shape, cpu, ranks or Ranks())


def joined(step_batch):
    """Texts and noise of all micro-batches."""
    parts = step_batch.micro_batches
    return [text for part in parts for text in part.texts], torch.cat([one.noise for one in parts])


def test_a_step_follows_from_seed_and_step():
    texts, noise = joined(batches()(7))
    again, same = joined(batches()(7))
    assert texts == again
    assert torch.equal(noise, same)
    assert not torch.equal(noise, joined(batches()(8))[1])
    assert not torch.equal(noise, joined(batches(train={"seed": 1})(7))[1])
    assert sorted(texts) == ["apple", "pear", "plum"]
    assert noise.shape == (3, 16, 2, 2)
    assert noise.std() == pytest.approx(1, rel=0.2)


def test_a_line_has_its_own_negative_prompt_or_that_of_the_run():
    (batch,) = batches()(0).micro_batches
    assert isinstance(batch, PictureBatch)
    found = dict(zip(batch.texts, batch.negative_pooled[:, 0].tolist(), strict=True))
    assert found == {"apple": 0, "pear": 4, "plum": 0}


def test_ranks_have_the_whole_batch_between_them():
    whole = batches()(3)
    shares = [batches(Ranks(rank, 2))(3) for rank in (0, 1)]
    assert [share.first_example for share in shares] == [0, 1]
    assert all(share.whole == whole.whole == 3 and share.leading == 3 for share in shares)
    texts = [text for share in shares for text in joined(share)[0]]
    assert texts == joined(whole)[0]
    assert torch.equal(torch.cat([joined(share)[1] for share in shares]), joined(whole)[1])


def test_micro_batches_have_as_many_pictures_as_fit():
    """Eight probes of a prompt share a forward pass: of sixteen rows two prompts have room."""
    parts = batches(train={"micro_batch_size": 16})(0).micro_batches
    assert [len(part) for part in parts] == [2, 1]


def test_more_ranks_than_prompts_are_refused():
    with pytest.raises(ConfigError):
        batches(Ranks(0, 4))
