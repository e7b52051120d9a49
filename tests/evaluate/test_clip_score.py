"""CLIP score: the formulas against their definitions, and the embedded scorer as open_clip itself
loads it.
"""

import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from qzo_diffusion import resources
from qzo_diffusion.core.errors import ConfigError, ModelError
from qzo_diffusion.evaluate import clip_score
from qzo_diffusion.evaluate.scorer import DEFAULT_SCORER, OpenClipScorer, load_scorer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scorer():
    return load_scorer("embedded", CPU, resources.embedded_scorer())


@pytest.fixture(scope="module")
def drawings():
    """The demo's held-out drawings with their captions, which are their names."""
    folder = resources.PACKAGE / "demo_images/fluent_mono/held_out"
    files = sorted(folder.glob("*.png"))
    return [Image.open(file).convert("RGB") for file in files], [
        file.stem.replace("_", " ") for file in files
    ]


def features(seed, count=30, width=64):
    return torch.randn(2, count, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(3))
def test_the_score_is_that_of_torchmetrics(seed):
    """As torchmetrics.functional.multimodal.clip_score computes it from features, in fp32."""
    images, texts = features(seed)
    unit_images = images / images.norm(p=2, dim=-1, keepdim=True)
    unit_texts = texts / texts.norm(p=2, dim=-1, keepdim=True)
    score = 100 * (unit_images * unit_texts).sum(axis=-1)
    expected = torch.max(score.mean(0), torch.zeros(())).item()
    assert clip_score.as_torchmetrics(clip_score.cosines(images, texts)) == pytest.approx(
        expected, abs=1e-5
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_original_score_is_that_of_its_authors(seed):
    """w · np.clip(np.sum(images · candidates, axis=1), 0, None) with w = 2.5 on unit features
    (arXiv 2104.08718).
    """
    images, texts = (part.double().numpy() for part in features(seed))
    images = images / np.sqrt(np.sum(images**2, axis=1, keepdims=True))
    texts = texts / np.sqrt(np.sum(texts**2, axis=1, keepdims=True))
    expected = np.mean(2.5 * np.clip(np.sum(images * texts, axis=1), 0, None))
    found = clip_score.as_original(clip_score.cosines(*features(seed)))
    assert found == pytest.approx(expected, abs=1e-5)
    # floored pair by pair, not as a mean
    assert found > clip_score.as_torchmetrics(clip_score.cosines(*features(seed))) / 40


@pytest.mark.parametrize(
    ("prompt", "trigger", "content"),
    [
        ("red apple, noto style", None, "red apple"),
        ("a fox in the snow", None, "a fox in the snow"),
        ("a dog in a field in watercolour style", None, "a dog in a field"),
        ("a ship in the style of an old master", None, "a ship"),
        ("a picture of a cat in sks style", "sks", "a picture of a cat"),
        ("sks, a cat", "sks", "a cat"),
        ("a cat by sks", "sks", "a cat"),
        ("sksthing beside a cat", "sks", "sksthing beside a cat"),
        ("a stylish hat", None, "a stylish hat"),
        ("noto style", "noto", ""),
    ],
)
def test_words_of_style_are_taken_out_of_a_prompt(prompt, trigger, content):
    assert clip_score.content_of(prompt, trigger) == content


@given(
    st.lists(
        st.sampled_from(["a", "cat", "in", "zxq", "style", ",", "red", "by"]), max_size=12
    ).map(" ".join)
)
def test_no_trigger_is_left_in_any_prompt(prompt):
    content = clip_score.content_of(prompt, "zxq")
    assert "zxq" not in content.split()
    assert clip_score.content_of(content, "zxq") == content or "style" in content


def test_the_embedded_scorer_names_drawings(scorer, drawings):
    """The caption of its own is the nearest of 16 for most drawings; by chance it would be one."""
    images, names = drawings
    cosine = scorer.image_features(images) @ scorer.text_features(names).T
    assert (cosine.argmax(1) == torch.arange(16)).sum() >= 12


def test_open_clip_loads_the_embedded_scorer_like_any_other_folder():
    import open_clip

    source = f"local-dir:{resources.embedded_scorer()}"
    model, preprocess = open_clip.create_model_from_pretrained(source)
    ids = open_clip.get_tokenizer(source)(["red apple"])
    text = model.encode_text(ids, normalize=True)
    image = model.encode_image(preprocess(Image.new("RGB", (64, 64), "red"))[None], normalize=True)
    assert text.shape == image.shape
    size = sum(file.stat().st_size for file in resources.embedded_scorer().iterdir())
    assert size < 20e6


def test_a_score_does_not_depend_on_the_batch(scorer, drawings):
    """Products of other shapes sum in another order: some units of fp32's last place, 6e-8, on a
    cosine.
    """
    images, names = drawings
    found = []
    for size in (1, 5, 16):
        other = load_scorer("embedded", CPU, resources.embedded_scorer(), batch_size=size)
        found.append(clip_score.score(other, other.image_features(images), names))
    again = clip_score.score(scorer, scorer.image_features(images), names)
    assert again == found[-1]
    for one in found:
        assert one["mean"] == pytest.approx(again["mean"], abs=1e-6)
        assert one["ci95"] == pytest.approx(again["ci95"], abs=1e-6)


def test_a_score_names_its_scorer_and_its_prefix_changes_it(scorer, drawings):
    images, names = drawings
    pictures = scorer.image_features(images)
    result = clip_score.score(scorer, pictures, names, base=pictures)
    assert result["note"] == "embedded scorer, not comparable with CLIP ViT-L/14"
    assert result["n"] == 16
    assert (result["delta"], result["delta_ci95"]) == (0, (0, 0))
    assert result["x100"] == pytest.approx(100 * result["mean"])
    assert result["with_prefix"]["mean"] != result["mean"]


def test_prompts_that_are_cut_are_counted(scorer):
    length = scorer.tokenizer.context_length
    fits = " ".join(["apple"] * (length - 2))
    assert scorer.truncated(["red apple", fits]) == 0
    assert scorer.truncated(["red apple", f"{fits} apple", "x " * 500]) == 2


def test_prompts_that_the_real_tokenizer_cuts_are_counted():
    import open_clip

    other = OpenClipScorer("", "", None, None, open_clip.SimpleTokenizer(context_length=8), CPU)
    assert other.truncated(["a b c d e f", "a b c d e f g"]) == 1


@pytest.mark.parametrize("name", ["nonsense", "ViT-L-14-quickgelu/nonsense", "ViT-L-14-quickgelu"])
def test_unknown_scorers_are_refused(name):
    with pytest.raises(ConfigError, match="no scorer"):
        load_scorer(name, CPU, resources.embedded_scorer())


def test_a_scorer_whose_weights_are_not_here_says_how_to_get_them(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"hf download timm/vit_large_patch14_clip_224\.openai"):
        load_scorer(DEFAULT_SCORER, CPU, resources.embedded_scorer())


def test_pickles_and_damaged_weights_are_refused(tmp_path):
    pickle = tmp_path / "weights.pt"
    pickle.write_bytes(b"x")
    with pytest.raises(ModelError, match="safetensors"):
        load_scorer(f"ViT-B-32/{pickle}", CPU, resources.embedded_scorer())
    with pytest.raises(ModelError, match=r"open_clip_config\.json"):
        load_scorer(str(tmp_path), CPU, resources.embedded_scorer())
    for file in resources.embedded_scorer().iterdir():
        (tmp_path / file.name).write_bytes(
            file.read_bytes()[: 10_000 if file.suffix == ".safetensors" else None]
        )
    with pytest.raises(ModelError, match="can't be loaded"):
        load_scorer(str(tmp_path), CPU, resources.embedded_scorer())


@pytest.mark.parametrize("fault", ["a tensor less", "a tensor more"])
def test_a_scorer_of_other_tensors_than_its_config_has_is_refused(tmp_path, fault):
    """open_clip compares names strictly; this holds it to that."""
    folder = shutil.copytree(resources.embedded_scorer(), tmp_path / "scorer")
    file = folder / "open_clip_model.safetensors"
    tensors = load_file(file)
    if fault == "a tensor less":
        del tensors["text_projection"]
    else:
        tensors["text_projection_scale"] = torch.ones(1)
    save_file(tensors, file)
    with pytest.raises(ModelError, match="can't be loaded"):
        load_scorer(str(folder), CPU, resources.embedded_scorer())
