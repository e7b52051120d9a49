"""Which quantized layers take part, by their names."""

import re
from collections.abc import Iterable, Sequence


def matching(names: Iterable[str], parts: Sequence[str]) -> list[str]:
    """The names that hold one of the dotted parts: "attn.to_q" is in "blocks.0.attn.to_q"."""
    return [name for name in names if any(f".{part}." in f".{name}." for part in parts)]


def in_the_middle(names: Iterable[str]) -> list[str]:
    """The names in blocks at 40 to 70 % of the depth: those with the numbers 12 to 20 of 30. Layers outside of blocks aren't."""
    block = {name: int(number[1]) for name in names if (number := re.search(r"(?:^|\.)(\d+)\.", name))}
    depth = max(block.values(), default=-1) + 1
    chosen = range(depth * 4 // 10, -(-depth * 7 // 10))
    return [name for name in block if block[name] in chosen]
