"""Chooses layers by their names."""

import re
from collections.abc import Iterable, Sequence


def matching(names: Iterable[str], parts: Sequence[str]) -> list[str]:
    """The names that hold one of the dotted parts: "attn.to_q" is in "blocks.0.attn.to_q"."""
    return [name for name in names if any(f".{part}." in f".{name}." for part in parts)]


TO_QUERIES_AND_KEYS = {"q_proj", "k_proj", "to_q", "to_k", "query", "key"}
INTO_ATTENTION = TO_QUERIES_AND_KEYS | {"v_proj", "to_v", "value", "to_qkv"}
# of the stream of text tokens in models that have one
TEXT_STREAM = re.compile(r"(^|_)context|^add_|^to_add_|^txt_")


def chosen(names: Iterable[str], wanted: Sequence[str] | None) -> list[str]:
    """The layers that a setting means: by parts of names, by the words "quiet" and "image", or all
    for None.
    """
    if wanted is None:
        return list(names)
    if wanted == "image":
        return image(names)
    return quiet(names) if wanted == "quiet" else matching(names, wanted)


def image(names: Iterable[str]) -> list[str]:
    """Return the layers that write to the stream of image tokens, and those that scale and shift it
    (docs/decisions/keeping_content.md D95).

    Projections into attention and layers of the text stream are left out.
    """
    return [
        name
        for name in names
        if INTO_ATTENTION.isdisjoint(parts := name.split("."))
        and not any(TEXT_STREAM.search(part) for part in parts)
    ]


# Each is the only reader of its input (an activation or an attention), in transformers of
# pictures and in models like Llama.
LAST_READERS = (
    "ff.net.2",
    "ff_context.net.2",
    "ff.linear_out",
    "ff_context.linear_out",
    "img_mlp.net.2",
    "txt_mlp.net.2",
    "attn.to_out",
    "attn2.to_out.0",
    "attention.to_out.0",
    "feed_forward.w2",
    "mlp.down_proj",
    "self_attn.o_proj",
)


def last_readers(names: Iterable[str]) -> list[str]:
    """Layers whose inputs no later layer reads.

    A branch reads what the residual beside it reads afterwards (`quant.branched`).
    """
    return [name for name in matching(names, LAST_READERS) if not name.endswith(".down")]


def quiet(names: Iterable[str]) -> list[str]:
    """Return the layers of a language model with little noise for their signal
    (docs/decisions/language_models.md D42).

    They are in blocks at 40 to 90 % of the depth, numbers 12 to 26 of 30, without projections that
    give queries or keys alone. Layers outside of blocks are left out. GPTQ's layers are called
    `q_proj.inner` where their inputs are permuted, so the last part but one of a name counts as
    well.
    """
    block = {
        name: int(number[1]) for name in names if (number := re.search(r"(?:^|\.)(\d+)\.", name))
    }
    depth = max(block.values(), default=-1) + 1
    chosen = range(depth * 4 // 10, -(-depth * 9 // 10))
    return [
        name
        for name in block
        if block[name] in chosen and TO_QUERIES_AND_KEYS.isdisjoint(name.split("."))
    ]
