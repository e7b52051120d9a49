"""Forward hooks that can be removed whenever an interrupt comes.

`module.register_forward_hook` first sets the hook and then returns the handle that removes it. An
interrupt in between leaves a hook that nothing can remove. Here the handle is noted first."""

from collections.abc import Callable, MutableMapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class Hooks:
    """Hooks of several modules that are removed together."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook` as `register_forward_pre_hook` does."""
        self._set(module._forward_pre_hooks, hook)

    def after(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook` as `register_forward_hook` does."""
        self._set(module._forward_hooks, hook)

    def remove(self) -> None:
        """Remove all; can be called again when it was interrupted."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _set(self, hooks: MutableMapping[int, Any], hook: Callable[..., Any]) -> None:
        handle = RemovableHandle(hooks)
        self._handles.append(handle)
        hooks[handle.id] = hook
