"""Which layers take part."""

import pytest

from qzo_diffusion.quant.choose import image, matching, quiet


def test_parts_of_names_match_whole_words():
    names = ["blocks.0.attn.to_q", "blocks.0.attn.to_qkv", "proj_out"]
    assert matching(names, ["to_q"]) == ["blocks.0.attn.to_q"]
    assert matching(names, ["attn.to_qkv", "proj_out"]) == names[1:]
    assert matching(names, ["t"]) == []


QUIET_BLOCKS = [
    (30, range(12, 27)),
    (32, range(12, 29)),
    (38, range(15, 35)),
    (2, range(2)),
    (1, range(1)),
]


@pytest.mark.parametrize(("depth", "expected"), QUIET_BLOCKS)
def test_quiet_layers_are_at_40_to_90_percent_of_the_blocks(depth, expected):
    names = [
        f"model.layers.{block}.mlp.{kind}"
        for block in range(depth)
        for kind in ("up.0.proj", "down.7.proj")
    ]
    found = quiet(["embed", *names, "head"])
    assert found == [name for name in names if int(name.split(".")[2]) in expected]
    assert len(found) == 2 * len(expected)


def test_projections_to_queries_and_keys_are_not_quiet():
    names = [f"model.layers.0.self_attn.{kind}_proj" for kind in "qkvo"]
    # GPTQ with desc_act
    assert quiet([f"{name}.inner" for name in names]) == [f"{name}.inner" for name in names[2:]]
    assert quiet([*names, "blocks.0.attn.to_k", "blocks.0.attn.to_qkv"]) == [
        *names[2:],
        "blocks.0.attn.to_qkv",
    ]


def test_a_model_without_blocks_has_no_quiet_layers():
    assert quiet(["embed", "head"]) == []


IMAGE_STREAMS = {
    "sd3": (
        "norm1.linear attn.to_out.0 attn2.to_out.0 ff.net.0.proj ff.net.2",
        "norm1_context.linear attn.to_q attn.to_v attn.add_k_proj attn.to_add_out ff_context.net.2",
    ),
    "flux1": (
        "norm1.linear norm.linear proj_mlp proj_out attn.to_out.0",
        "norm1_context.linear attn.to_q attn.add_q_proj attn.to_add_out ff_context.net.0.proj",
    ),
    "unet": (
        "proj_in proj_out attn1.to_out.0 attn2.to_out.0 ff.net.0.proj",
        "attn1.to_q attn2.to_k attn2.to_v",
    ),
    "qwen_image": ("img_mod.1 img_mlp.net.2 attn.to_out.0", "txt_mod.1 txt_mlp.net.2 attn.to_k"),
}


@pytest.mark.parametrize(("kept", "left_out"), IMAGE_STREAMS.values(), ids=IMAGE_STREAMS)
def test_image_layers_write_to_the_image_or_scale_it(kept, left_out):
    kept, left_out = ([f"blocks.3.{name}" for name in part.split()] for part in (kept, left_out))
    assert image([*left_out, *kept]) == kept
