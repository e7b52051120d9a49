"""The trigger of a set of captions, and prompts with and without it."""

import pytest

from qzo_diffusion.diffusion.trigger import Trigger, find_trigger, with_and_without


@pytest.mark.parametrize(
    ("captions", "word", "prompt"),
    [
        (["a cat, zxq", "a dog, zxq"], "zxq", "pear, zxq"),
        (["a cat in zxq style", "two dogs in zxq style"], "zxq", "pear in zxq style"),
        (["zxq, a cat", "zxq, a dog"], "zxq", "zxq, pear"),
        (["a zxq cat", "the zxq dog"], "zxq", "pear, zxq"),
        # the same caption for all
        (["a picture in zxq style"] * 5, "zxq", "pear in zxq style"),
        (["a cat, zxq", "a dog", "a hen, zxq"], "zxq", "pear, zxq"),
        # no trigger was named
        (["cat, ink wash", "dog, ink wash", "hen, ink wash"], None, "pear, ink wash"),
        (
            ["a cat in ink style", "a dog in ink style", "hen in ink style"],
            None,
            "pear in ink style",
        ),
        (["inkw, cat, sat", "inkw, dog", "inkw, hen"], None, "inkw, pear"),
    ],
)
def test_prompts_take_the_trigger_as_captions_do(captions, word, prompt):
    found = find_trigger(captions, word)
    assert found.added("pear") == prompt
    assert found.is_in(prompt)
    assert found.added(prompt) == prompt


@pytest.mark.parametrize(
    ("captions", "word"),
    [
        (["a cat", "a dog", "a hen, zxq"], "zxq"),
        (["zxqs", "a zxqu"], "zxq"),
        (["square 0", "square 1", "square 2"], None),
        (["leaf"] * 6, None),
        (["cat, red", "dog, red"], None),
        (["a cat, red", "a dog, blue", "a hen"], None),
        ([], None),
        ([], "zxq"),
        (["", ""], "zxq"),
    ],
)
def test_captions_without_a_trigger_have_none(captions, word):
    assert find_trigger(captions, word) is None


def test_half_of_the_prompts_hold_it_unless_the_file_decides():
    trigger = Trigger("zxq", after=" in zxq style")
    assert with_and_without(["a", "b", "c"], trigger) == ["a in zxq style", "b", "c in zxq style"]
    for prompts in (["a zxq", "b"], ["zxq"]):
        assert with_and_without(prompts, trigger) == prompts
    assert with_and_without(["a", "b"], None) == ["a", "b"]
