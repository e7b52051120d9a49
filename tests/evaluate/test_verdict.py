"""One sentence for a run: each ground may veto, and none is claimed that nobody measured."""

import json
import math

import pytest
from PIL import Image, ImageDraw, ImageFilter

from qzo_diffusion.evaluate import scorer
from qzo_diffusion.evaluate.task_score import TaskScore
from qzo_diffusion.evaluate.verdict import of_task, overall, verdict
from qzo_diffusion.system.files import finite


def change(delta, width=0.01):
    return {"delta": delta, "delta_ci95": [delta - width, delta + width]}


def results(
    style=0.1,
    content=0.0,
    kid=-0.2,
    loss=-0.3,
    gap=0.2,
    suits=True,
    note=scorer.EMBEDDED_NOTE,
    **more,
):
    """A run on which all went well, unless told otherwise."""
    figures = {"mean": 0.4 + style, "base_mean": 0.4, "n": 32}
    return {
        "scorer": {"name": "embedded scorer", "note": note, "suits": suits},
        "clip_score": {"mean": 0.67 + content, "base_mean": 0.67, "note": note} | change(content),
        "style": {
            "similarity": figures | change(style),
            "kid": {"base": 0.3, "value": 0.3 + kid} | change(kid),
            "cmmd": {"base": 8.0, "value": 8.0 + kid, "delta": kid},
            "control": {"gap": gap, "ci95": [gap - 0.1, gap + 0.1]},
            "nearest": {"copies": 0, "held_out_max": 0.9, "base_max": 0.8},
        },
        "validation_loss": {"base": 1.0, "tuned": 1.0 + loss} | change(loss),
        "signal": {"base": {"agreement_ci95": [0.5, 0.9]}, "sentence": "It carries signal."},
    } | more


@pytest.mark.parametrize(
    ("given", "sign", "text"),
    [
        ({}, "good", "The style came and the content stayed."),
        # pictures that fell apart: similarity alone would have praised them
        (
            {"style": 0.048, "kid": 0.6, "content": -0.34, "gap": 0.05},
            "bad",
            "Worse than the base: content lost, style not seen.",
        ),
        (
            {"content": -0.34},
            "bad",
            "Worse than the base: content lost, though the style came.",
        ),
        ({"kid": 0.6}, "bad", "Worse than the base: the pictures moved away from the style."),
        ({"style": -0.2}, "bad", "Worse than the base: the pictures moved away from the style."),
        (
            {"loss": 0.5, "style": 0.0},
            "bad",
            "Worse than the base: the held-out loss rose, style not seen.",
        ),
        (
            {"gap": 0.05},
            "open",
            "No verdict on style: this scorer does not tell the style from the base's pictures.",
        ),
        (
            {"suits": False},
            "open",
            "No verdict on style: this scorer was not made for such pictures.",
        ),
        (
            {"suits": False, "content": -0.3},
            "bad",
            "Worse than the base: content lost, no verdict on style (this scorer was not made for "
            "such pictures).",
        ),
        ({"style": 0.0}, "open", "No change of style is certain; the content stayed."),
        # nearer by its mean, but not by its distribution
        ({"kid": 0.005}, "open", "No change of style is certain; the content stayed."),
        (
            {"compared_with": "what the run began with", "content": -0.3},
            "bad",
            "Worse than what the run began with: content lost, though the style came.",
        ),
    ],
)
def test_one_sentence(given, sign, text):
    found = verdict(results(**given))
    assert found[0] == {"sign": sign, "text": text}
    assert ("The style came" in " ".join(one["text"] for one in found[1:])) == (
        "style came" in text
    )


def test_without_a_control_there_is_no_verdict_on_style():
    found = results()
    for control in (None, {"gap": 0.3, "ci95": None}):
        found["style"]["control"] = control
        assert overall(found)["text"].startswith("No verdict on style: too few images")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_said_before_and_after_it_was_written(value):
    loss = {"base": 1.0, "tuned": value, "delta": value, "delta_ci95": [value, value]}
    found = results(validation_loss=loss)
    said = verdict(found)
    assert said[0]["sign"] == "bad"
    assert "diverged" in said[0]["text"]
    assert verdict(json.loads(json.dumps(finite(found), allow_nan=False))) == said
    assert "nan" not in " ".join(one["text"] for one in said)


def test_a_score_of_another_model_is_not_called_a_clip_score():
    texts = [one["text"] for one in verdict(results())]
    assert not any("CLIP" in text for text in texts)
    assert any("content score" in text for text in texts)
    assert any("CLIP score" in one["text"] for one in verdict(results(note="")))


def test_copies_are_those_beyond_the_bases_pictures_too():
    found = results()
    found["style"]["nearest"] = {"copies": 3, "base_max": 0.8}
    text = "3 of 32 pictures are closer to a training image than the base's pictures are"
    assert any(one["text"].startswith(text) for one in verdict(found))


def test_a_language_model_that_diverged_is_said():
    scores = {
        "task": "sst2",
        "metric": "loss",
        "test_examples": 4,
        "by_step": {"0": 3.1, "9": None},
    }
    found = of_task(TaskScore.read(scores))
    assert found == [
        {"sign": "bad", "text": "The run diverged: Loss on sst2 is no finite number at step 9."}
    ]


def drawing(index, ground="white"):
    image = Image.new("RGB", (200, 150), ground)
    ImageDraw.Draw(image).ellipse((30, 20, 120 + index, 110), fill="teal", outline="black")
    return image


def photo(index):
    """Light and noise, as a camera sees them."""
    noise = Image.effect_noise((400, 300), 30 + index).convert("RGB")
    return Image.blend(noise, Image.radial_gradient("L").resize((400, 300)).convert("RGB"), 0.6)


def test_photos_are_not_what_the_embedded_scorer_knows():
    note = scorer.EMBEDDED_NOTE
    for ground in ("white", "navy"):
        assert scorer.suits(note, [drawing(index, ground) for index in range(4)])["suits"]
    blurred = [photo(index).filter(ImageFilter.GaussianBlur(2)) for index in range(4)]
    for photos in ([photo(index) for index in range(4)], blurred):
        found = scorer.suits(note, photos)
        assert not found["suits"]
        assert found["flat_share"] < found["least_flat_share"]
        assert scorer.suits("", photos)["suits"]
    # one photo among drawings decides nothing
    assert scorer.suits(note, [photo(0), *(drawing(index) for index in range(3))])["suits"]
