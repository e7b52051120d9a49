"""Convert between diffusers' layout of a denoiser and the layout of single files, which ComfyUI and
sd-scripts read.

Both hold the same numbers. An original tensor is one of diffusers' tensors, several of them on top
of each other (q, k and v), or one whose halves lie in the other order (shift and scale). A family
has one table, which serves both directions.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.quant.describe import described_tensors
from qzo_diffusion.quant.entries import Entry, joined
from qzo_diffusion.quant.weights import Pending

PREFIX = "model.diffusion_model."
# The largest denoiser has 57 layers. A forged file may name any number, and each takes memory.
LAYERS = {"num_layers", "num_single_layers", "n_layers", "n_refiner_layers"}
MOST_LAYERS = 200


@dataclass(frozen=True)
class Pieces:
    """Diffusers' names of the parts of one original tensor, top to bottom. `swapped`: its halves
    lie in the other order. rows: of each part; equally many if it is empty.
    """

    names: tuple[str, ...]
    swapped: bool = False
    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class TableLayout:
    """The layout of a family.

    title: of the family. sign: the beginning of a name that no other family has. table: original
    name (without prefix) -> its parts, for a denoiser of a config. config: infers that config from
    the tensors of a file; it may raise KeyError for one that is missing. flattened: tensors whose
    first dimension is 1, which llama.cpp drops where it writes a file. without: the beginning of a
    name that another family has beside this sign. of_diffusers: names without prefix are
    diffusers' own, so that a config.json beside a file is that of its model.
    """

    title: str
    sign: str
    table: Callable[[Mapping[str, Any]], dict[str, Pieces]]
    config: Callable[[Mapping[str, Entry]], dict[str, Any]]
    flattened: tuple[str, ...] = ()
    without: str | None = None
    of_diffusers: bool = False

    def is_original(self, names: Iterable[str]) -> bool:
        own = [name.removeprefix(PREFIX) for name in names]
        if self.without is not None and any(name.startswith(self.without) for name in own):
            return False
        return any(name.startswith(self.sign) for name in own)

    def are_of_diffusers(self, names: Iterable[str]) -> bool:
        return self.of_diffusers and not _prefixed(names)

    def whole_shapes(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """Return the entries of a GGUF file with their first dimension where it was dropped."""
        return {
            name: replace(one, shape=(1, *one.shape))
            if name.removeprefix(PREFIX) in self.flattened and one.shape[:1] != (1,)
            else one
            for name, one in entries.items()
        }

    def config_of(self, entries: Mapping[str, Entry]) -> dict[str, Any]:
        """Infer diffusers' config from the shapes of a checkpoint.

        Raises:
            ModelError: it is of another family.
        """
        try:
            config = self.config(without_prefix(entries))
            if sum(int(config.get(key, 0)) for key in LAYERS) > MOST_LAYERS:
                raise KeyError(f"a number of layers up to {MOST_LAYERS}")
            return config
        except (KeyError, IndexError, ZeroDivisionError, ValueError) as error:
            kind = described_tensors(entries)
            raise ModelError(
                f"a single file that is {kind.name}"
                if kind
                else f"a single file that is no denoiser of {self.title}: it lacks {error}",
                f"a checkpoint of {self.title}, as its authors publish it",
                kind.remedy if kind else "give that file, or a diffusers folder",
            ) from None

    def to_diffusers(
        self, entries: Mapping[str, Entry], config: Mapping[str, Any]
    ) -> dict[str, Entry]:
        """Return the same bytes of the file under diffusers' names.

        Other parts of the file (VAE, encoders) are left out. Tensors of the denoiser that the
        layout lacks keep their place beside a layer, so that a foreign scale is noticed.

        Raises:
            ModelError: a tensor is missing.
        """
        names, found = without_prefix(entries), dict[str, Entry]()
        table = self.table(config)
        for original, pieces in table.items():
            if original not in names:
                raise ModelError(
                    f"a single file without {original}",
                    "all tensors of the transformer",
                    "download it again",
                )
            found |= _parts(original, names[original], pieces, self.title)
        left = {_place_of(name, table): names[name] for name in names if name not in table}
        return found | left

    def to_original(
        self, tensors: Mapping[str, Pending], config: Mapping[str, Any]
    ) -> dict[str, Pending]:
        """Return diffusers' tensors under the original names, with the prefix."""
        return {
            PREFIX + original: _put_together(
                [tensors[name] for name in pieces.names], pieces.swapped
            )
            for original, pieces in self.table(config).items()
        }


def count_blocks(names: Iterable[str], blocks: str) -> int:
    """Return the number of blocks in a list of them."""
    return len({one[1] for name in names if (one := re.match(rf"{blocks}\.(\d+)\.", name))})


def with_bias(pairs: Iterable[tuple[str, Pieces]]) -> dict[str, Pieces]:
    """Return the weights and biases of layers that are paired with their parts."""
    return {
        f"{original}.{kind}": Pieces(
            tuple(f"{name}.{kind}" for name in pieces.names), pieces.swapped, pieces.rows
        )
        for original, pieces in pairs
        for kind in ("weight", "bias")
    }


def norms_of(original: str, ours: str) -> Iterator[tuple[str, Pieces]]:
    """Yield the norms of queries and keys, in the names of Black Forest Labs."""
    for name, part in (("query", "q"), ("key", "k")):
        yield f"{original}.{name}_norm.scale", Pieces((f"{ours}{part}.weight",))


def _parts(original: str, entry: Entry, pieces: Pieces, title: str) -> dict[str, Entry]:
    """Split one original tensor into diffusers' tensors."""
    count = len(pieces.names)
    if count == 1 and not pieces.swapped:
        return {pieces.names[0]: entry}
    sections = 2 if pieces.swapped else count
    height = entry.shape[0] if entry.shape else 0
    rows = pieces.rows or (height // sections,) * sections
    if height == 0 or sum(rows) != height:
        raise ModelError(
            f"{original} of the shape {entry.shape}",
            f"rows that {sections} tensors share",
            f"give a file of {title}",
        )
    ends = [0, *accumulate(rows)]
    parts = [entry.rows(start, stop) for start, stop in pairwise(ends)]
    whole = [joined(parts[::-1])] if pieces.swapped else parts
    return dict(zip(pieces.names, whole, strict=True))


def _place_of(name: str, table: Mapping[str, Pieces]) -> str:
    """Return the name that a tensor beside a layer has beside diffusers' layer."""
    layer, _, part = name.rpartition(".")
    pieces = table.get(f"{layer}.weight")
    return name if pieces is None else f"{pieces.names[0].rpartition('.')[0]}.{part}"


def _put_together(parts: list[Pending], swapped: bool) -> Pending:
    def make() -> Tensor:
        whole = torch.cat([part.make() for part in parts])
        return torch.cat(whole.chunk(2)[::-1]) if swapped else whole

    if len(parts) == 1 and not swapped:
        return parts[0]
    return Pending(
        parts[0].dtype, (sum(part.shape[0] for part in parts), *parts[0].shape[1:]), make
    )


def without_prefix(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return the denoiser's tensors."""
    chosen = _chosen(entries)
    return {name.removeprefix(PREFIX): entry for name, entry in chosen}


def _prefixed(names: Iterable[str]) -> bool:
    return any(name.startswith(PREFIX) for name in names)


def _chosen(entries: Mapping[str, Entry]) -> Iterator[tuple[str, Entry]]:
    """Yield the denoiser's tensors; a file without the prefix is the denoiser alone."""
    prefixed = _prefixed(entries)
    return (
        (name, entry) for name, entry in entries.items() if not prefixed or name.startswith(PREFIX)
    )
