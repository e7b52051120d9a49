"""The page: whole, safe and small, whatever a run's folder holds."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qzo_diffusion.evaluate import charts
from qzo_diffusion.evaluate.report import RunFacts, Subject, data_url, figure, interval, render
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
        assert 'class="verdict"' not in page
        assert "on sst2" in page


@pytest.mark.parametrize(
    "wrong",
    [{"by_step": [1]}, {"by_step": {"first": 0.5}}, {"by_step": {"0": None}}, {"test_examples": 0}],
)
def test_figures_of_a_task_that_cannot_be_right_are_refused(wrong):
    with pytest.raises((KeyError, TypeError, ValueError)):
        TaskScore.read(
            {"task": "sst2", "metric": "accuracy", "test_examples": 872, "by_step": {"0": 0.5}}
            | wrong
        )


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
