"""The blocks before the first trained one: no probe changes what they give, so it need not be
computed for each probe anew.

A step asks for it once for all probes of an example, and where the same texts come again, what was
computed for a text once is read back from a file. With the default's layers, blocks 12 to 26 of 30,
probes then cost 18 / 30 of plain forwards at the least, and with eight of an example 0.65 of them
where nothing was kept.

The rest of a model can't be called on hidden states in general: position embeddings, masks and
norms are its own business. So the model runs as it is, with blocks that pass on what they get in
the place of those that are left out."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

BLOCK = re.compile(r"^(.*?)\.(\d+)\.")
PROBE_TOKENS = 8


class PassOn(nn.Module):
    """In the place of a block: gives `hidden` if it has one, else what it is given, which it keeps
    in `seen`.
    """

    def __init__(self, block: nn.Module, hidden: Tensor | None = None) -> None:
        super().__init__()
        self.hidden, self.seen = hidden, hidden
        if hasattr(block, "attention_type"):
            # models with several kinds of attention ask their blocks which mask they need
            self.attention_type = block.attention_type

    def forward(self, hidden_states: Tensor, *_args: object, **_kwargs: object) -> Tensor:
        self.seen = hidden_states
        return hidden_states if self.hidden is None else self.hidden


class Prefix:
    """Blocks 0 .. count - 1 of a decoder, apart from the others.

    Args:
        base: the model without its head; called with `input_ids` it gives `last_hidden_state`.
        blocks: its list of blocks.
        count: how many come before the first trained one, at least 1.
    """

    def __init__(self, base: nn.Module, blocks: nn.ModuleList, count: int) -> None:
        self._base, self._blocks, self._count = base, blocks, count

    @property
    def count(self) -> int:
        return self._count

    @torch.no_grad()
    def before(self, ids: Tensor) -> Tensor:
        """What the first trained block reads: ids [R, T] -> [R, T, D]."""
        end = PassOn(self._blocks[self._count])
        rest = [PassOn(block) for block in self._blocks[self._count + 1 :]]
        with self._in_place([*self._blocks[: self._count], end, *rest]):
            self._base(input_ids=ids, use_cache=False)
        assert end.seen is not None
        return end.seen

    def after(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """The last hidden state [R, T, D] of ids [R, T], given `before` of them."""
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
        """Whether the two parts together are bit for bit the model, on a short text.

        Not where blocks give tuples, which only the model itself can read.
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
    """None when the first block is trained, something outside of the blocks is, or the model's
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
