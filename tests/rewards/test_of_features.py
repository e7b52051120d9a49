"""Rewards in a scorer's features, with a scorer whose features are known: mean colours."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.rewards.of_features import ClipScore, Features, LinearHead, StyleSimilarity
from qzo_diffusion.rewards.preference import Preference

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class Colours:
    """Features of a picture are its mean colour, those of a text the colour that it names."""

    name, note = "colours", ""

    def __init__(self):
        self.pictures = self.texts = 0

    def image_features(self, images):
        self.pictures += len(images)
        pixels = [torch.tensor(list(one.tobytes())).view(-1, 3).float() for one in images]
        return F.normalize(torch.stack([one.mean(0) for one in pixels]), dim=1)

    def text_features(self, texts):
        self.texts += len(texts)
        return torch.tensor([COLOURS[text] for text in texts]).float() / 255


def plain(colour):
    return Image.new("RGB", (8, 8), colour)


@pytest.fixture
def scorer():
    return Colours()


RED, BLUE, PURPLE = map(plain, ("red", "blue", "purple"))


def test_the_match_with_the_prompt_leaves_out_words_of_style(scorer):
    reward = ClipScore(Features(scorer), trigger="zxq")
    prompts = ["red", "red, flat style", "blue in zxq style"]
    assert reward([RED, BLUE, PURPLE], prompts) == pytest.approx([1, 0, 0.5**0.5])


def test_the_nearer_to_the_style_the_higher(scorer):
    near, middle, far = StyleSimilarity(Features(scorer), [plain("red"), plain((200, 9, 0))])(
        [RED, PURPLE, BLUE], [""] * 3
    )
    assert near > 0.99 > middle > 0.5 > far


def test_pictures_are_encoded_once_for_all_rewards_of_a_call_and_texts_once_in_a_run(scorer):
    features = Features(scorer)
    rewards = (ClipScore(features), LinearHead(features, torch.ones(3), 0.0))
    for _ in range(2):
        pictures = [RED, BLUE]
        for reward in rewards:
            reward(pictures, ["red", "blue"])
    assert (scorer.pictures, scorer.texts) == (4, 2)


def head(tmp_path, **tensors):
    save_file(tensors, tmp_path / "head.safetensors")
    return tmp_path / "head.safetensors"


def knows_a_picture(scorer):
    scorer.text_features = lambda texts: torch.zeros(len(texts), 3)
    return Features(scorer)


def test_a_linear_head_is_weight_and_bias(tmp_path, scorer):
    file = head(tmp_path, weight=torch.tensor([[2.0, 0.0, -1.0]]), bias=torch.tensor([0.5]))
    reward = LinearHead.load(knows_a_picture(scorer), file)
    assert reward([RED, BLUE], [""] * 2) == pytest.approx([2.5, -0.5])


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"weight": torch.ones(1, 4)}, "4 features"),
        ({"other": torch.ones(1, 3)}, "other"),
        ({"weight": torch.tensor([[1.0, float("nan"), 0.0]])}, "not finite"),
        ({"weight": torch.ones(1, 3), "bias": torch.ones(2)}, "shapes"),
    ],
)
def test_another_file_is_refused(tmp_path, scorer, tensors, reason):
    with pytest.raises(ModelError, match=reason):
        LinearHead.load(knows_a_picture(scorer), head(tmp_path, **tensors))


def test_a_file_that_lies_about_its_size_is_refused(tmp_path, scorer):
    file = head(tmp_path, weight=torch.ones(1, 3))
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ModelError):
        LinearHead.load(knows_a_picture(scorer), file)


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory):
    """A small random CLIP in transformers' layout, with its processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    from tests.small_pipeline import fill_, tokenizer

    text = {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "max_position_embeddings": 24,
        "bos_token_id": 257,
        "eos_token_id": 256,
        "pad_token_id": 256,
    }
    vision = text | {"image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    folder = tmp_path_factory.mktemp("clip")
    fill_(CLIPModel(config), 7).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer(24, "<begin>", "<end>")).save_pretrained(folder)
    return folder


def test_a_preference_is_the_cosine_of_its_clip_and_has_its_logit_scale(small_clip):
    """With random weights: the published ones are not here."""
    device = torch.device("cpu")
    plain_one, scaled = (Preference.load(small_clip, one, device) for one in (False, True))
    pictures, prompts = [RED, BLUE, PURPLE] * 4, ["an apple", "the sea", "a plum"] * 4
    cosines = plain_one(pictures, prompts)
    assert len(cosines) == 12
    assert all(-1 <= one <= 1 for one in cosines)
    assert cosines[:3] == pytest.approx(cosines[9:], abs=1e-5)
    assert len(set(cosines[:3])) == 3
    factor = float(plain_one._model.logit_scale.exp())
    assert scaled(pictures, prompts) == pytest.approx([factor * one for one in cosines])


def test_a_folder_without_safetensors_is_refused(small_clip, tmp_path):
    (tmp_path / "config.json").write_text((small_clip / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ModelError, match="can't be loaded"):
        Preference.load(tmp_path, True, torch.device("cpu"))
