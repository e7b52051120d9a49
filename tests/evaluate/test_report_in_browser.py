"""The page as a person sees it, in headless Chromium: it loads without a complaint, its sliders
move, and it fits a phone.

Screenshots are kept in outputs/report_screenshots/, to be looked at.
"""

import math
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from qzo_diffusion.evaluate.report import RunFacts, Subject, render
from tests import browser

KEPT = Path(__file__).parents[2] / "outputs/report_screenshots"

pytestmark = pytest.mark.skipif(browser.missing() is not None, reason=str(browser.missing()))


def drawing(colour, sides):
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).regular_polygon((32, 32, 26), sides, fill=colour, outline="black")
    return image


def facts():
    """A run of four prompts and three steps, evaluated, with everything that the page can show."""
    names = {
        "a triangle": 3,
        "a square": 4,
        "a hexagon": 6,
        "an octagon with a rather long name, to be wrapped": 8,
    }
    colours = {"step 0": "red", "step 50": "purple", "step 100": "black"}
    subjects = [
        Subject(name, {label: drawing(colour, sides) for label, colour in colours.items()})
        for name, sides in names.items()
    ]
    scored = [
        Subject(
            name,
            {"base": drawing("red", n), "tuned": drawing("black", n)},
            ["CLIP score 0.61 → 0.59"],
        )
        for name, n in names.items()
    ]
    metrics = [
        {"step": step, "loss": 2 + math.exp(-step / 30) + 0.2 * math.sin(7 * step)}
        for step in range(100)
    ]
    metrics += [
        {"step": step, "validation_loss": 1.8 + math.exp(-step / 30)} for step in (0, 50, 100)
    ]
    return RunFacts(
        name="ink",
        step=100,
        max_steps=100,
        finished=True,
        subjects=subjects,
        scored=scored,
        metrics=metrics,
        settings={"model": "tiny", "train": {"lr": 0.1}},
        dataset=[],
        environment={"torch": "2"},
        journal={"steps": 100, "bytes": 6000, "chain": "0123456789abcdef"},
        evaluation=evaluation(),
        written="2026-11-25 12:00 UTC",
    )


def evaluation():
    def entry(mean, delta):
        return {
            "n": 4,
            "mean": mean,
            "std": 0.1,
            "ci95": [mean - 0.1, mean + 0.1],
            "base_mean": mean - delta,
            "delta": delta,
            "delta_ci95": [delta - 0.05, delta + 0.05],
        }

    loss = {"base": 2.8, "tuned": 1.8, "delta": -1.0, "delta_ci95": [-1.2, -0.8]}
    estimate = {
        "agreement": 0.8,
        "agreement_ci95": [0.6, 0.9],
        "signal_to_noise": 4.0,
        "step_sizes": [{"group": "row", "rms": 0.01}],
        "exact": {"cosine": 0.02, "expected": 0.024},
    }
    prefixed = {"mean": 0.5, "x100": 50.0, "original": 1.3}
    return {
        "step": 100,
        "scorer": {
            "name": "embedded scorer",
            "note": "embedded scorer, not comparable with CLIP ViT-L/14",
        },
        "clip_score": entry(0.6, -0.01)
        | {"x100": 60.0, "original": 1.5, "with_prefix": prefixed, "truncated_prompts": 0},
        "style": {
            "similarity": entry(0.5, 0.2),
            "control": {
                "held_out": 0.9,
                "others": 0.3,
                "gap": 0.6,
                "ci95": [0.5, 0.7],
                "against": "pictures of the base model",
            },
            "kid": {"value": 1.0, "base": 3.0, "delta": -2.0, "delta_ci95": [-2.5, -1.5]},
            "cmmd": {"value": 5.0, "base": 8.0, "delta": -3.0},
            "nearest": {
                "mean": 0.7,
                "max": 0.8,
                "closest": {"picture": 0, "image": "a.png"},
                "held_out_mean": 0.9,
            },
            "diversity": {"tuned": 0.5, "style": 0.5, "base": 0.6},
        },
        "validation_loss": loss
        | {"images": 16, "n": 64, "bands": [loss | {"sigma": 0.125, "n": 16}]},
        "signal": {
            "base": estimate,
            "tuned": estimate | {"exact": None},
            "clipped": 0.0,
            "skipped": 0.0,
            "moved": [{"group": "attn.to_q", "layers": 4, "scales": 4096, "rms": 0.1, "max": 0.4}],
            "sentence": "The estimate carries signal: two independent batches agree on 80% of the "
            "slope along a random direction.",
        },
        "steps": [
            {"step": s, "similarity": entry(0.3 + s / 500, 0), "clip_score": entry(0.6, 0)}
            for s in (0, 50, 100)
        ],
        "verdict": [
            {"sign": "good", "text": "The style came."},
            {"sign": "open", "text": "Content?"},
            {"sign": "bad", "text": "No."},
        ],
    }


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(render(facts()))
    with browser.browser() as opened:
        opened.emulate(dark=False, width=1280, height=900)
        opened.open(file)
        yield opened


def test_it_loads_without_a_complaint(page):
    assert page.run("return document.title") == "ink · qzo-diffuse"
    assert page.run(
        "return [...document.images].every(image => image.complete && image.naturalWidth > 0)"
    )
    assert page.run("return document.images.length") == 4 * 3 + 4 * 2
    assert (
        page.run(
            "return performance.getEntriesByType('resource').filter(e => "
            "!e.name.startsWith('data:')).length"
        )
        == 0
    )
    assert page.complaints() == []


def test_a_line_moves_by_keyboard_and_by_pointer(page):
    at = (
        "return getComputedStyle(document.querySelector('#steps "
        ".pair')).getPropertyValue('--at').trim()"
    )
    before = page.run(at)
    page.keys("#steps .pair input", "\ue012")  # arrow left
    assert float(page.run(at).rstrip("%")) == float(before.rstrip("%")) - 1
    page.drag("#steps .pair input", 0.9)
    assert float(page.run(at).rstrip("%")) == pytest.approx(90, abs=8)
    assert page.run(
        "return getComputedStyle(document.querySelector('#steps .pair img.after')).clipPath"
    ).startswith("inset(0")


def test_all_lines_move_together(page):
    page.keys("#steps .all", "\ue011")  # home
    found = page.run(
        "return [...document.querySelectorAll('#steps .pair')].map(pair => "
        "pair.style.getPropertyValue('--at'))"
    )
    assert found == ["0%"] * 4


def test_the_step_of_the_right_side_can_be_chosen(page):
    shown = "return [...document.querySelectorAll('#steps img.after')].map(image => image.alt)"
    assert all(text.endswith("step 100") for text in page.run(shown))
    page.keys("#steps .step", "\ue012")
    assert page.run("return document.querySelector('#steps output').textContent") == "step 50"
    assert all(text.endswith("step 50") for text in page.run(shown))
    hidden = (
        "return [...document.querySelectorAll('#steps img')].filter(image => "
        "getComputedStyle(image).display == 'none').length"
    )
    assert page.run(hidden) == 4
    page.keys("#steps .step", "\ue010")  # end: as it was


def test_everything_can_be_reached_and_named(page):
    """Each control has a name for a screen reader, each picture a text."""
    controls = "[...document.querySelectorAll('input, button, svg, progress')]"
    assert (
        page.run(
            f"return {controls}.filter(one => !(one.ariaLabel || one.textContent.trim())).length"
        )
        == 0
    )
    assert page.run("return [...document.images].filter(image => !image.alt).length") == 0


@pytest.mark.parametrize(
    ("dark", "width"), [(False, 1280), (True, 1280), (False, 390), (True, 390)]
)
def test_it_is_readable_in_light_and_dark_and_on_a_phone(page, dark, width):
    page.emulate(dark, width, 844)
    assert page.run("return document.documentElement.scrollWidth <= innerWidth"), (
        "the page is wider than the screen"
    )
    for selector in (
        "body",
        ".soft",
        ".verdict .good b",
        ".verdict .open b",
        "figcaption",
        "td.soft",
    ):
        assert contrast(page, selector) >= 4.5, selector
    page.screenshot(KEPT / f"{'dark' if dark else 'light'}_{width}.png")


def test_the_button_changes_the_colours(page):
    page.emulate(dark=False, width=1280, height=900)
    ground = "return getComputedStyle(document.body).backgroundColor"
    light = page.run(ground)
    page.click("#theme")
    dark = page.run(ground)
    page.click("#theme")
    assert page.run(ground) == light != dark
    assert page.complaints() == []


def contrast(page, selector):
    """WCAG 2 contrast of an element's text with the ground behind it; 4.5 is its bar for plain
    text.
    """
    script = f"""
      let element = document.querySelector({selector!r}), colour = getComputedStyle(element).color;
      const behind = () => getComputedStyle(element).backgroundColor;
      while (element && /rgba\\(0, 0, 0, 0\\)/.test(behind())) element = element.parentElement;
      const numbers = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
      return [colour, behind()].map(numbers);"""
    lights = [
        sum(
            weight * linear(value)
            for weight, value in zip((0.2126, 0.7152, 0.0722), rgb, strict=True)
        )
        for rgb in page.run(script)
    ]
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def linear(value):
    share = value / 255
    return share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4
