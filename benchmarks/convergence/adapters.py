"""QLoRA (arXiv 2305.14314) as a line of reference: adapters of rank 8 beside every quantized layer,
for one cell.
"""

from collections.abc import Sequence

from torch import nn

from qzo_diffusion.llm.baselines import add_lora_, lora_gradient, lora_theta

RANK, ALPHA = 8, 16.0


class Adapters:
    """Put beside the layers by peft, whose wrappers take the layers' places until `remove_` gives
    them back.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], seed: int) -> None:
        self._model, self._plain = model, {name: model.get_submodule(name) for name in layers}
        add_lora_(model, layers, rank=RANK, alpha=ALPHA, seed=seed)
        self.theta = lora_theta(model)
        self.gradient = lora_gradient(model)

    def remove_(self) -> None:
        for name, layer in self._plain.items():
            parent, _, last = name.rpartition(".")
            setattr(self._model.get_submodule(parent), last, layer)
