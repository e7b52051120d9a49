"""The page: whole, safe and small, whatever a run's folder holds."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qzo_diffusion.evaluate import charts
from qzo_diffusion.evaluate.report import RunFacts, Subject, data_url, render
from qzo_diffusion.evaluate.report_figures import figure, interval
from qzo_diffusion.evaluate.task_score import TaskScore


def young(**facts):
    return RunFacts(**({"name": "run", "step": 3, "max_steps": 10, "finished": False} | facts))


def test_a_run_that_has_just_begun_has_a_page():
    page = render(young())
    assert "Step 3 of 10" in page
    assert "<progress" in page


def language_model(metric="accuracy", **by_step):
    scores = {"task": "sst2", "metric": metric, "test_examples": 872, "by_step": by_step}
    return young(task_score=TaskScore.read(scores))


def test_a_language_models_page_says_how_well_it_does_its_task():
    page = render(language_model(**{"2000": 0.786, "0": 0.511, "1000": 0.75}))
    assert "Accuracy on sst2 rose: 0.511 to 0.786, +0.275 (95 % interval +0.232 to +0.318)." in page
    assert 'class="good"' in page
    assert "872 test examples, higher is better" in page
    assert "did not change for certain" in render(language_model(**{"0": 0.51, "9": 0.52}))


def test_a_language_models_page_of_one_step_or_of_a_loss_claims_nothing():
    for facts in (language_model(**{"0": 0.511}), language_model("loss", **{"0": 3.1, "9": 2.8})):
        page = render(facts)
        assert 'id="sentence"' not in page
        assert "on sst2" in page


@pytest.mark.parametrize(
    "wrong",
    [{"by_step": [1]}, {"by_step": {"first": 0.5}}, {"by_step": {"0": []}}, {"test_examples": 0}],
)
def test_figures_of_a_task_that_cannot_be_right_are_refused(wrong):
    with pytest.raises((KeyError, TypeError, ValueError)):
        TaskScore.read(
            {"task": "sst2", "metric": "accuracy", "test_examples": 872, "by_step": {"0": 0.5}}
            | wrong
        )


@pytest.mark.parametrize("value", ["nan", "inf", float("nan"), float("-inf"), 1e300, None])
def test_a_diverged_run_has_a_page_that_says_so(value):
    metrics = [{"step": step, "loss": 1.0} for step in range(9)]
    metrics += [{"step": 9, "loss": value}, {"step": 10, "validation_loss": value}]
    page = render(young(metrics=metrics))
    said = "The run diverged: its held-out loss is no finite number at step 10." in page
    assert said == (value != 1e300)
    assert "<polyline" in page
    assert not re.search(r"\b(nan|inf)\b", re.sub(r"<style>.*?</style>", "", page, flags=re.S))


def test_a_language_model_that_diverged_has_a_page():
    page = render(language_model("loss", **{"0": 3.1, "5": None, "9": float("nan")}))
    assert "The run diverged: Loss on sst2 is no finite number at step 5." in page


def test_the_page_shows_the_styles_images_costs_and_what_to_do_next():
    page = render(
        young(
            style=[Subject("a leaf", {"": Image.new("RGB", (64, 64), "green")})],
            costs={"device": "cpu", "minutes": "3.1"},
            next=[
                ("pictures at half of its strength", "qzo-diffuse sample --run run --strength 0.5")
            ],
            prompts_note="8 of 16 prompts hold the trigger 'zxq'.",
        )
    )
    for text in ('alt="a leaf"', "device <b>cpu</b>", "--strength 0.5", "8 of 16 prompts hold"):
        assert text in page


def test_the_page_asks_for_nothing_from_a_network():
    subject = Subject(
        "a cat", {"step 0": Image.new("RGB", (64, 64)), "step 9": Image.new("RGB", (64, 64), "red")}
    )
    page = render(young(subjects=[subject]))
    assert re.findall(r"(?:https?:)?//[\w.]+", re.sub(r"base64,[^\"]+", "", page)) == []
    assert "default-src 'none'" in page
    for source in re.findall(r"(?:src|href)=\"([^\"]*)\"", page):
        assert source.startswith("data:")


def test_text_of_users_stays_text():
    nasty = '<script>alert(1)</script> & "quotes" \' {{ 7 * 7 }}'
    subject = Subject(nasty, {nasty: Image.new("RGB", (64, 64))})
    row = {
        "file": nasty,
        "caption": nasty,
        "caption_source": "txt",
        "split": "train",
        "tokens": 3,
        "sha256": "ab" * 32,
        "notes": ["grey", nasty],
    }
    page = render(young(name=nasty, subjects=[subject], settings={nasty: nasty}, dataset=[row]))
    assert "<script>alert" not in page
    assert "{{ 7 * 7 }}" in page
    assert "abababababab…" in page


def test_control_characters_and_turned_text_are_shown_as_escapes():
    nasty = "a\x1b[31m\x00\u202egnp\nb"
    subject = Subject(nasty, {nasty: Image.new("RGB", (64, 64))})
    facts = young(name=nasty, subjects=[subject], style=[subject], settings={nasty: nasty})
    page = render(replace(facts, dataset=[{"file": nasty, "notes": [nasty]}], costs={"a": nasty}))
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", page)
    assert page.count("a\\x1b[31m\\x00\\u202egnp\\nb") >= 8


def test_large_pictures_are_embedded_small_and_small_ones_as_they_are():
    noise = Image.effect_noise((1024, 768), 90).convert("RGB")
    assert data_url(noise).startswith("data:image/webp;base64,")
    assert len(data_url(noise)) < 120_000
    assert data_url(Image.new("RGB", (64, 64))).startswith("data:image/png;base64,")


def test_of_many_steps_the_first_and_the_last_are_shown():
    pictures = {f"step {step}": Image.new("RGB", (32, 32)) for step in range(100)}
    page = render(young(subjects=[Subject("a cat", pictures)]))
    shown = re.findall(r'alt="a cat, (step \d+)"', page)
    assert (len(shown), shown[0], shown[-1]) == (12, "step 0", "step 99")


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300))
def test_curves_stay_inside_their_box(values):
    points = charts.binned(list(range(len(values))), values)
    drawn = charts.chart("t", [charts.Series("a", points, marks=True)], "y")
    box = drawn["box"]
    for pair in drawn["curves"][0]["line"].split() + drawn["curves"][0]["band"].split():
        x, y = (float(number) for number in pair.split(","))
        assert box["left"] <= x <= box["right"]
        assert box["top"] <= y <= box["bottom"]
    assert drawn["y_ticks"]


def test_bins_hold_the_mean_and_its_interval():
    points = charts.binned(list(range(120)), [1.0, 3.0] * 60, bins=2)
    assert [(point.x, point.y) for point in points] == [(29.5, 2.0), (89.5, 2.0)]
    # sample deviation √(60 / 59), 60 values
    assert points[0].high - points[0].y == pytest.approx(1.96 / 59**0.5)
    assert charts.chart("t", [charts.Series("a", [])], "y") is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.12345, "0.1235"),
        (1234, "1,234"),
        (0.00001, "1.00e-05"),
        (0.0, "0.0000"),
        ("nan", "nan"),
    ],
)
def test_figures_for_a_person(value, text):
    assert figure(value) == text


def test_intervals_for_a_person():
    assert interval((-0.5, 0.25)) == "-0.5000 to +0.2500"
    assert interval(None) == "–"
