"""Which layers take part."""

import pytest

from qzo_diffusion.quant.choose import in_the_middle, matching


def test_parts_of_names_match_whole_words():
    names = ["blocks.0.attn.to_q", "blocks.0.attn.to_qkv", "proj_out"]
    assert matching(names, ["to_q"]) == ["blocks.0.attn.to_q"]
    assert matching(names, ["attn.to_qkv", "proj_out"]) == names[1:]
    assert matching(names, ["t"]) == []


MIDDLES = [(30, range(12, 21)), (32, range(12, 23)), (38, range(15, 27)), (2, range(2)), (1, range(1))]


@pytest.mark.parametrize(("depth", "expected"), MIDDLES)
def test_the_middle_is_40_to_70_percent_of_the_blocks(depth, expected):
    names = [f"model.layers.{block}.mlp.{kind}" for block in range(depth) for kind in ("up.0.proj", "down.7.proj")]
    found = in_the_middle(["embed", *names, "head"])
    assert found == [name for name in names if int(name.split(".")[2]) in expected]
    assert len(found) == 2 * len(expected)


def test_a_model_without_blocks_has_no_middle():
    assert in_the_middle(["embed", "head"]) == []
