"""How the embedded model is trained: what it is taught, what is kept from it, and the loop."""

import pytest
import torch
from torch import nn

from benchmarks.tiny.drawings import CONCEPTS_FILE, read_knowledge
from benchmarks.tiny.lessons import PLAIN_FORMS, TREATED_FORMS, Lessons, captions_of, knowledge
from benchmarks.tiny.ranks import Ranks
from benchmarks.tiny.training import Recipe, load_average, train_resumable
from benchmarks.tiny.treatments import SET_ASIDE, TAUGHT, ground, treat

NEVER_TAUGHT = {"fluent_mono", "fluent3d", "openmoji"}


@pytest.fixture(scope="module")
def drawings():
    """Two drawings, uint8 [2, 3, 64, 64]: a red disc with a blue bar, and a dark ring with a white
    middle and a green dot."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    far = ((y - 32).square() + (x - 32).square()).sqrt()
    images = torch.ones(2, 3, 64, 64)
    images[0, :, far < 24] = torch.tensor([0.9, 0.25, 0.2]).view(3, 1)
    images[0, :, 28:36, 16:48] = torch.tensor([0.2, 0.4, 0.9]).view(3, 1, 1)
    images[1, :, (far < 26) & (far > 20)] = torch.tensor([0.2, 0.2, 0.3]).view(3, 1)
    images[1, :, far < 6] = torch.tensor([0.3, 0.8, 0.3]).view(3, 1)
    return (images * 255).round().to(torch.uint8)


def test_only_styles_whose_drawings_may_ship_are_taught():
    taught = knowledge()
    assert set(taught.styles) == {"noto", "fluent_flat", "twemoji"}
    assert not NEVER_TAUGHT & set(taught.styles)
    assert len(set(taught.concepts)) == len(taught.concepts) >= 500
    assert len(set(taught.held_out)) == 64
    assert set(taught.held_out) <= set(taught.concepts)
    assert set(read_knowledge(CONCEPTS_FILE).concepts) <= set(taught.concepts)


def test_what_is_taught_and_what_is_set_aside_do_not_overlap(drawings):
    assert knowledge().treatments == list(TAUGHT)
    assert not TAUGHT.keys() & SET_ASIDE.keys()
    taught = torch.stack([treat(name, drawings) for name in TAUGHT]).float()
    for name in SET_ASIDE:
        apart = (taught - treat(name, drawings).float()).abs().mean((1, 2, 3, 4))
        assert apart.min() > 10, name  # of 255


def black_on_white(images):
    """Is nearly every pixel black or white, with white around? Bool per image."""
    values = images.float() / 255
    grey = values.amax(1) - values.amin(1) < 0.12
    extreme = grey & ((values.amax(1) < 0.3) | (values.amin(1) > 0.9))
    return (extreme.float().mean((1, 2)) > 0.9) & (values[:, :, 0, 0].amin(1) > 0.9)


def test_no_taught_treatment_is_black_lines_on_white(drawings):
    dark = drawings.amin(1, keepdim=True) < 200
    assert black_on_white(torch.where(dark, 0, 255).expand_as(drawings)).all()
    for name in TAUGHT:  # the second drawing is nearly black lines on white itself
        assert not black_on_white(treat(name, drawings))[0], name


def test_treatments_are_deterministic_and_leave_their_input_alone(drawings):
    before = drawings.clone()
    for name in TAUGHT | SET_ASIDE:
        first = treat(name, drawings)
        assert first.dtype == torch.uint8
        assert first.shape == drawings.shape
        assert torch.equal(first, treat(name, drawings)), name
        assert not torch.equal(first, drawings), name
    assert torch.equal(before, drawings)


def test_ground_is_the_white_outside_and_not_the_white_inside(drawings):
    around = ground(drawings.float() / 255)[1, 0]
    assert around[0, 0] == 1
    assert around[32, 45] == 0  # white within the ring
    assert around[32, 9] == 0  # the ring


def test_every_caption_fits_the_prompt():
    from benchmarks.tiny.architecture import PROMPT_TOKENS
    from benchmarks.tiny.vocabulary import build_clip_tokenizer, build_t5_tokenizer

    captions = captions_of(knowledge())
    plain = [f"a drawing of {caption}" for caption in captions if caption.count(",") < 2]
    asked = sorted(captions + plain, key=len)[-2000:]
    for tokenizer in (build_clip_tokenizer(captions), build_t5_tokenizer(captions)):
        assert max(map(len, tokenizer(asked).input_ids)) <= PROMPT_TOKENS


def test_half_of_a_batch_is_treated_and_captions_say_so():
    assert sum(PLAIN_FORMS.values()) == pytest.approx(1)
    assert sum(TREATED_FORMS.values()) == pytest.approx(1)
    latents = torch.arange(3.0).view(3, 1, 1, 1, 1).expand(3, 4000, 1, 1, 1)
    lessons = Lessons(latents, ["cat"] * 4000, ["flat style"] * 4000, ["grey", "pale"])
    clean, captions = lessons.draw(4000, torch.Generator().manual_seed(3))
    rows = clean.flatten().long()
    assert (rows > 0).float().mean() == pytest.approx(0.5, abs=0.04)
    for row, caption in zip(rows.tolist(), captions, strict=True):
        named = {"grey", "pale"} & set(caption.split(", "))
        assert named <= ({["grey", "pale"][row - 1]} if row else set())
        assert bool(named) == bool(row and caption)


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))


def fit(folder, steps, stop_at=None, watch=None):
    """Train on a loss whose randomness is the step's; `stop_at` raises in that step."""
    model = Line()

    def loss(step, generator):
        if step == stop_at:
            raise KeyboardInterrupt
        return (model.weight - torch.randn(4, generator=generator)).square().sum()

    recipe = Recipe(steps, 0.1, checkpoint_seconds=0)
    folder.mkdir(exist_ok=True)
    train_resumable(model, loss, recipe, checkpoint=folder / "line.safetensors", watch=watch)
    return model.weight.detach()


def test_a_resumed_training_is_the_unbroken_one(tmp_path):
    whole = fit(tmp_path / "whole", 9)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "parts", 9, stop_at=5)
    assert torch.equal(fit(tmp_path / "parts", 9), whole)
    again = Line()
    assert load_average(again, tmp_path / "parts/line.safetensors") == 9
    assert torch.equal(again.weight.detach(), whole)


def test_looking_at_the_averaged_weights_changes_nothing(tmp_path):
    seen = []
    watched = fit(tmp_path / "watched", 6, watch=seen.append)
    assert torch.equal(watched, fit(tmp_path / "alone", 6))
    assert seen == [1, 2, 3, 4, 5, 6]


def test_one_rank_averages_nothing():
    tensors = [torch.ones(2), torch.zeros(3)]
    Ranks().average_(tensors)
    assert tensors[0].tolist() == [1, 1]
