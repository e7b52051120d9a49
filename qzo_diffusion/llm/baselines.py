"""Baselines for language models: MeZO on the unquantized weights, and QLoRA.

Both train tensors of their own in place of scales, behind the interface of scales. So the same
estimator, loop, batches, checkpoints and evaluation serve them. MeZO (arXiv 2305.17333) needs
nothing else. QLoRA (arXiv 2305.14314) is first-order: apart from `core.oracle`, only this file
differentiates.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qzo_diffusion.core.absolute import DenseAbsolute
from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.core.noise import torch_generator
from qzo_diffusion.core.parametrization import Parametrization
from qzo_diffusion.core.probes import Objective
from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.core.weights import WeightHandle


def mezo_theta(model: nn.Module, layers: Sequence[str]) -> DenseAbsolute:
    """Return theta over the unquantized weights of the named layers.

    For a 16-bit model theta is kept in fp32 beside it: most of MeZO's updates would round to
    nothing.
    """
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in layers}
    return DenseAbsolute(
        ScaleSet(WeightHandle(name, module.weight, [module]) for name, module in modules.items())
    )


def add_lora_(
    model: nn.Module, layers: Sequence[str], *, rank: int, alpha: float, seed: int
) -> None:
    """Put adapters beside the named layers, by peft. Untrained adapters change nothing.

    The random half of each adapter is drawn from the seed and the layer's name, so every process
    and every resume has the same one.

    Raises:
        ModelError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ModelError(
            "no package peft", "peft, for the method qlora", "pip install 'qzo-diffusion[qlora]'"
        ) from None

    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=list(layers)), model
    )
    for name, module in _adapters(model):
        weight: Any = module.float().requires_grad_(True).weight
        if "lora_A" in name:
            drawn = torch.rand(weight.shape, generator=torch_generator(seed, "lora", name))
            weight.data.copy_((2 * drawn - 1) / weight.shape[1] ** 0.5)


def lora_theta(model: nn.Module) -> DenseAbsolute:
    """Return theta over the adapters of a model. Move the model first: a later move leaves theta
    behind.
    """
    return DenseAbsolute(
        ScaleSet(WeightHandle(name, module.weight, [module]) for name, module in _adapters(model))
    )


def _adapters(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if name.endswith((".lora_A.default", ".lora_B.default")):
            yield name, module


def lora_gradient(
    model: nn.Module,
) -> Callable[[Objective[Any], Sequence[Any], Parametrization], dict[str, Tensor]]:
    """Return a function that gives dL/d(adapters) of the mean loss over all examples, by name."""

    def gradient(
        objective: Objective[Any], micro_batches: Sequence[Any], theta: Parametrization
    ) -> dict[str, Tensor]:
        count = sum(map(len, micro_batches))
        weights: dict[str, Any] = {
            name: model.get_submodule(name).weight for name in theta.templates()
        }
        with torch.enable_grad():
            for micro_batch in micro_batches:
                (objective(micro_batch).sum() / count).backward()
        found = {}
        for name, weight in weights.items():
            found[name] = torch.zeros_like(weight.data) if weight.grad is None else weight.grad
            weight.grad = None
        return found

    return gradient
