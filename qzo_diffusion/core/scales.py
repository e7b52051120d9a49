"""The live quantization scales of a model, and overrides that a forward pass uses instead.

Weights are never modified. `s += εz; s -= 2εz; s += εz` does not restore s (after 1,000 rounds:
7e-6 relative in fp32, 54 % in bf16), and an exception in between leaves it displaced. Here layers
temporarily use other tensors, a few neighbouring layers at a time, and go back to the live ones
afterwards.

θ of whole rows or block columns needs no temporary scales: it scales a layer's outputs and inputs,
and can differ from example to example (`core.activation_scaling`)."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qzo_diffusion.core.activation_scaling import (
    ActivationScaling,
    ScaledLayer,
    bias_beside,
    without_bias,
)
from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.core.hooks import Hooks
from qzo_diffusion.core.weights import WeightHandle

OVERRIDDEN_AT_ONCE = 2**20
"""Neighbouring layers are overridden together up to this many scales (4 MB, about three layers of
SD3.5 Large): between two layers of a forward pass a Python call costs several times as much as in a
row, since the products have emptied the caches (on `tiny`: 360 against 50 microseconds a layer)."""
# a block of SD3.5 Large: a launch costs the same for any size
OVERRIDDEN_ON_GPU = 4 * OVERRIDDEN_AT_ONCE
FEW = 2**18  # scales that are overridden at once in models of any size
FEW_WITH_SCALING = 2**15  # the same where each example has factors of its own


def overridden_at_once(numel: int, device: str, few: int = FEW) -> int:
    """The most scales that are overridden at once in a model of `numel`: about an eighth."""
    return min(OVERRIDDEN_AT_ONCE if device == "cpu" else OVERRIDDEN_ON_GPU, max(few, numel // 8))


Override = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Names of layers -> the scales that their forward passes use; a layer that is left out uses its
live ones."""


class ScaleHandle(Protocol):
    """Access to the scales of one quantized layer, or to one plain weight, on any back-end."""

    @property
    def name(self) -> str: ...

    @property
    def module(self) -> nn.Module:
        """The layer; rows and columns ask for its `out_features` and its `bias`, or None."""

    @property
    def scales(self) -> Tensor:
        """The tensor that the layer's next forward will use."""

    def override(self, scales: Tensor) -> None:
        """Make the layer's next forward use `scales` instead."""


class ScaleSet:
    """Map layer names to the tensors that are trained: scales, integer codes or plain weights.

    `weights` names the entries that are unquantized tensors.

    Args:
        handles: one per quantized layer or unquantized tensor.
        dtypes: fp64 is for tests of theory, and integers are codes in the place of scales
            (`core.quzo`).

    Raises:
        ModelError: no handle, or a tensor of another dtype.
    """

    def __init__(
        self,
        handles: Iterable[ScaleHandle],
        dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64),
    ) -> None:
        self._handles = {handle.name: handle for handle in handles}
        if not self._handles:
            raise ModelError(
                "a model without quantized layers",
                "at least one 4-bit linear",
                "quantize the model first",
            )
        self.weights = frozenset(
            name for name, handle in self._handles.items() if isinstance(handle, WeightHandle)
        )
        self._live = {name: handle.scales for name, handle in self._handles.items()}
        for name, live in self._live.items():
            if live.dtype not in dtypes:
                raise ModelError(
                    f"{name}: scales in {live.dtype}",
                    "float32",
                    "prepare the layer with its back-end first",
                )
            if live.is_floating_point() and not bool(live.isfinite().all()):
                raise ModelError(
                    f"{name}: scales or weights that are not finite",
                    "finite numbers",
                    "download the model again",
                )
        self._numel = sum(live.numel() for live in self._live.values())
        self._chunks, self._chunks_with_scaling = (
            self._neighbours(FEW),
            self._neighbours(FEW_WITH_SCALING),
        )
        self._active: _Override | None = None

    def __iter__(self) -> Iterator[str]:
        return iter(self._live)

    def __len__(self) -> int:
        return len(self._live)

    def __getitem__(self, name: str) -> Tensor:
        return self._live[name]

    def tensors(self) -> dict[str, Tensor]:
        """All live tensors by name, not copies."""
        return dict(self._live)

    def rows(self, name: str) -> int:
        """Number of outputs N of the layer."""
        return int(self._handles[name].module.out_features)  # type: ignore[arg-type]

    def chunks(self) -> list[list[str]]:
        """The layers in order, neighbours together up to `overridden_at_once` scales."""
        return self._chunks

    def _neighbours(self, few: int) -> list[list[str]]:
        most = overridden_at_once(self._numel, next(iter(self._live.values())).device.type, few)
        return list(_chunks({name: live.numel() for name, live in self._live.items()}, most))

    def numel(self) -> int:
        return self._numel

    def restore(self, names: Iterable[str]) -> None:
        for name in names:
            self._handles[name].override(self._live[name])

    @contextmanager
    def override(
        self, scales: Override | None = None, scaling: ActivationScaling | None = None
    ) -> Iterator[None]:
        """While open, layers use other scales and scale their inputs and outputs; None changes
        nothing.

        An inner override replaces the outer one until it is closed. Everything is put back bit for
        bit, whatever exception or interrupt comes.
        """
        chunks = self._chunks if scaling is None else self._chunks_with_scaling
        outer, override = (
            self._active,
            _Override(self._handles, self._live, chunks, scales, scaling),
        )
        try:
            try:
                if outer is not None:
                    outer.close()
                self._active = override
                override.open()
                yield
            finally:
                self._end(override, outer)
        finally:  # once more: an interrupt may have cut the first one short
            self._end(override, outer)

    def close(self) -> None:
        """End an override that is still open.

        An interrupt can come between two instructions of a `with`, where its end is never reached.
        """
        if self._active is not None:
            self._active.close()
            self._active = None

    def _end(self, override: "_Override", outer: "_Override | None") -> None:
        """Return to `outer`; does nothing more when called again."""
        override.close()
        if self._active is override:
            self._active = outer
        if outer is not None and self._active is outer and not outer.is_open:
            outer.open()


class _Override:
    """One open override: its hooks, and everything that must be put back."""

    def __init__(
        self,
        handles: Mapping[str, ScaleHandle],
        live: Mapping[str, Tensor],
        chunks: Sequence[Sequence[str]],
        scales: Override | None,
        scaling: ActivationScaling | None,
    ) -> None:
        self._handles, self._live, self._chunks, self._override, self._scaling = (
            handles,
            live,
            chunks,
            scales,
            scaling,
        )
        self._chunk: int | None = None
        self._displaced: Sequence[str] = ()
        self._factors: dict[str, ScaledLayer] = {}
        self._biases: dict[str, nn.Parameter] = {}  # of layers that run without theirs
        self._hooks, self.is_open = Hooks(), False

    def open(self) -> None:
        """Set the hooks; begins anew where an interrupt has cut it short.

        A single chunk is set right away and needs no hook before a layer: most of the cost of a
        small model's step.
        """
        self.close()
        if self._override is not None or self._scaling is not None:
            self._set_hooks()
        self.is_open = True

    def _set_hooks(self) -> None:
        if len(self._chunks) == 1:
            self._set(0)
        for index, chunk in enumerate(self._chunks):
            for name in chunk:
                handle, factors = self._handles[name], self._factors.get(name)
                module = handle.module
                if len(self._chunks) > 1 or (factors and factors.scales_inputs):
                    users = handle.modules if isinstance(handle, WeightHandle) else (module,)
                    for user in users:
                        self._hooks.before(user, self._before(name, index))
                if self._scaling is not None and (len(self._chunks) > 1 or factors):
                    self._hooks.after(module, self._after(name))

    def close(self) -> None:
        """Safe at any moment, also between two lines of `open` or `_set`."""
        self.is_open = False
        self._put_back()
        self._hooks.remove()

    def _before(self, name: str, chunk: int) -> Callable[..., Any]:
        def prepare(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if self._chunk != chunk:
                self._set(chunk)
            factors = self._factors.get(name)
            return (
                (factors.scale_input(args[0]), *args[1:])
                if factors and factors.scales_inputs
                else None
            )

        return prepare

    def _after(self, name: str) -> Callable[..., Any]:
        def scale(_module: nn.Module, _args: Any, output: Tensor) -> None:
            factors = self._factors.get(name)
            if factors:
                factors.scale_output_(output)

        return scale

    def _set(self, chunk: int) -> None:
        """Override the layers of one chunk, after those of the chunk before are put back."""
        self._put_back()
        names = self._chunks[chunk]
        if self._scaling is not None:
            scaling = self._scaling(names)
            for name, layer_scaling in scaling.items():
                bias = bias_beside(layer_scaling, self._handles[name].module, name)
                if bias is not None:
                    # noted first: an interrupt in between must still be undone
                    self._biases[name] = bias
                    self._handles[name].module.register_parameter("bias", without_bias(bias))
            self._factors = {
                name: ScaledLayer(name, layer_scaling, self._biases.get(name))
                for name, layer_scaling in scaling.items()
            }
        if self._override is not None:
            scales_by_name = self._override(names)
            # noted first: an interrupt in between must still be undone
            self._displaced = names
            for name, scales in scales_by_name.items():
                self._handles[name].override(scales)
        self._chunk = chunk

    def _put_back(self) -> None:
        for name in self._displaced:
            self._handles[name].override(self._live[name])
        for name, bias in self._biases.items():
            self._handles[name].module.register_parameter("bias", bias)
        self._displaced, self._factors, self._biases, self._chunk = (), {}, {}, None


def _chunks(sizes: Mapping[str, int], most: int) -> Iterator[list[str]]:
    chunk: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if chunk and filled + size > most:
            yield chunk
            chunk, filled = [], 0
        chunk.append(name)
        filled += size
    yield chunk
