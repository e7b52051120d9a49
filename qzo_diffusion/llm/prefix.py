"""Run the blocks before the first trained one only once: no probe changes their output.

A step computes their output once for all probes of an example. If the same texts come again, it is
read back from a file. The default trains blocks 12 to 26 of 30. A probe then costs at least 18 / 30
of a plain forward pass, and 0.65 of it with eight probes of an example and no file.

A model can't be called on hidden states in general: its position embeddings, masks and norms are
its own. So the model runs as it is, and blocks that pass on their input replace those that are left
out.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

BLOCK = re.compile(r"^(.*?)\.(\d+)\.")
PROBE_TOKENS = 8


class PassOn(nn.Module):
    """Replace a block: return `hidden` if it is given, else the input, which is kept in `seen`."""

    def __init__(self, block: nn.Module, hidden: Tensor | None = None) -> None:
        super().__init__()
        self.hidden, self.seen = hidden, hidden
        if hasattr(block, "attention_type"):
            # models with several kinds of attention read the kind of mask from their blocks
            self.attention_type = block.attention_type

    def forward(self, hidden_states: Tensor, *_args: object, **_kwargs: object) -> Tensor:
        self.seen = hidden_states
        return hidden_states if self.hidden is None else self.hidden


class Prefix:
    """Blocks 0 .. count - 1 of a decoder, separated from the others.

    Args:
        base: the model without its head; called with `input_ids` it gives `last_hidden_state`.
        blocks: its list of blocks.
        count: the number of blocks before the first trained one, at least 1.
    """

    def __init__(self, base: nn.Module, blocks: nn.ModuleList, count: int) -> None:
        self._base, self._blocks, self._count = base, blocks, count

    @property
    def count(self) -> int:
        return self._count

    @torch.no_grad()
    def before(self, ids: Tensor) -> Tensor:
        """Return the input of the first trained block: ids [R, T] -> [R, T, D]."""
        end = PassOn(self._blocks[self._count])
        rest = [PassOn(block) for block in self._blocks[self._count + 1 :]]
        with self._in_place([*self._blocks[: self._count], end, *rest]):
            self._base(input_ids=ids, use_cache=False)
        assert end.seen is not None
        return end.seen

    def after(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Return the last hidden state [R, T, D] of ids [R, T], from the result of `before`."""
        start = [PassOn(block) for block in self._blocks[: self._count - 1]]
        with self._in_place(
            [*start, PassOn(self._blocks[self._count - 1], hidden), *self._blocks[self._count :]]
        ):
            last: Tensor = self._base(input_ids=ids, use_cache=False).last_hidden_state
        return last

    @contextmanager
    def _in_place(self, blocks: Sequence[nn.Module]) -> Iterator[None]:
        whole = dict(self._blocks._modules)
        try:
            self._blocks._modules.update(zip(whole, blocks, strict=True))
            yield
        finally:
            self._blocks._modules.update(whole)

    @torch.no_grad()
    def holds(self, device: torch.device) -> bool:
        """Return whether the two parts together give the model's bits, on a short text.

        They do not where blocks return tuples, which only the model itself can read.
        """
        ids = torch.arange(PROBE_TOKENS, device=device).unsqueeze(0)
        kinds: list[type] = []
        hook = self._blocks[0].register_forward_hook(
            lambda _module, _args, output: kinds.append(type(output))
        )
        try:
            whole: Tensor = self._base(input_ids=ids, use_cache=False).last_hidden_state
        finally:
            hook.remove()
        return kinds == [Tensor] and torch.equal(self.after(ids, self.before(ids)), whole)


def find_prefix(
    model: nn.Module, base: nn.Module, trained: Iterable[str], device: torch.device
) -> Prefix | None:
    """Return the blocks that no probe changes.

    Return None if the first block or something outside of the blocks is trained, or if the model's
    blocks can't be left out.

    Args:
        trained: names of layers, as `model` has them.
    """
    found = [BLOCK.match(name) for name in trained]
    stacks = {match[1] if match else "" for match in found}
    if len(stacks) != 1 or "" in stacks:
        return None
    blocks, count = (
        model.get_submodule(stacks.pop()),
        min(int(match[2]) for match in found if match),
    )
    if not isinstance(blocks, nn.ModuleList) or count == 0:
        return None
    prefix = Prefix(base, blocks, count)
    return prefix if prefix.holds(device) else None
