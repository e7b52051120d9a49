"""Sample with tuned scales at some noise levels and with the base's at the others.

High noise levels decide the layout of a picture, low ones its details. So a style whose outlines
are wanted and whose layout is not can be left out of the first steps."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.diffusion.flow_matching import shift_sigma


class TunedBetween(nn.Module):
    """Wrap a transformer that sampling calls once a step, so that scales change between steps only.

    Args:
        levels: the lowest and the highest noise level with tuned scales.
        outside: opens a context in which the transformer uses the base's scales.
        level: the noise level of a call, from its keyword arguments.
    """

    def __init__(
        self,
        transformer: nn.Module,
        levels: Sequence[float],
        outside: Callable[[], AbstractContextManager[None]],
        level: Callable[[Mapping[str, Any]], float],
    ) -> None:
        super().__init__()
        self.transformer, self._levels, self._outside = transformer, tuple(levels), outside
        self._level = level

    def __getattr__(self, name: str) -> Any:
        """Return the transformer's attribute where the wrapper has none of that name."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("transformer"), name)

    def forward(self, *args: Any, **options: Any) -> Any:
        """Call the transformer; all examples have one noise level."""
        low, high = self._levels
        # some pipelines give latents and time without their names
        named = dict(zip(("sample", "timestep"), args, strict=False)) | options
        inside = low <= self._level(named) <= high
        with nullcontext() if inside else self._outside():
            return self.transformer(*args, **options)


def base_outside(
    transformer: nn.Module,
    levels: Sequence[float],
    base: Mapping[str, Tensor],
    scales: Callable[[], ScaleSet],
    level: Callable[[Mapping[str, Any]], float],
) -> TunedBetween:
    """Return the transformer with the scales `base` (by layer) outside `levels`.

    `scales` gives its live scales when they are needed, `level` the noise level of a call.
    """

    def outside() -> AbstractContextManager[None]:
        live = scales()
        return live.override(lambda names: {name: base[name].to(live[name]) for name in names})

    return TunedBetween(transformer, levels, outside, level)


def steps_between(levels: Sequence[float], steps: int, shift: float) -> tuple[int, int]:
    """The first step with tuned scales and the one behind the last, of `steps` sampling steps.

    Step i has the noise level of ComfyUI's scheduler `simple`: 1 - i / steps, shifted.
    """
    low, high = levels
    own = [shift_sigma(1 - step / steps, shift) for step in range(steps)]
    return sum(level > high for level in own), sum(level >= low for level in own)


def in_comfyui(levels: Sequence[float], steps: int, shift: float) -> str:
    """Explain in Markdown how ComfyUI samples with tuned scales between `levels` alone."""
    start, end = steps_between(levels, steps, shift)
    low, high = levels
    spans = [("the base", 0, start), ("this one", start, end), ("the base", end, steps)]
    kept = [span for span in spans if span[1] < span[2]]
    rows = [
        f"| {model} | {'disable' if first else 'enable'} | {first} | {last} "
        f"| {'disable' if last == steps else 'enable'} |"
        for model, first, last in kept
    ]
    head = "| model | add_noise | start_at_step | end_at_step | return_with_leftover_noise |"
    return "\n".join(
        [
            f"The run's own pictures use the tuned scales at noise levels from {low:g} to "
            f"{high:g}, and the base's at the others.\n"
            "In ComfyUI, load both models and let the latents go through one "
            "`KSampler (Advanced)` for each row,\n"
            f"with {steps} steps, the same seed, scheduler `simple` and shift {shift:g}:\n",
            head,
            "|---|---|---|---|---|",
            *rows,
        ]
    )
