"""Define what each method of `qzo-diffuse llm` trains: one base model, four kinds of theta, one
loop.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qzo_diffusion.config.llm import LlmConfig
from qzo_diffusion.core.errors import ConfigError, ModelError
from qzo_diffusion.core.merge import check_numbers
from qzo_diffusion.core.parametrization import Parametrization
from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.llm import baselines
from qzo_diffusion.llm.causal_lm import CausalLm, load_causal_lm
from qzo_diffusion.llm.stored import empty_causal_lm, stored_method
from qzo_diffusion.quant.base import fingerprint, linears_to_quantize, nothing_to_quantize
from qzo_diffusion.quant.choose import chosen
from qzo_diffusion.quant.gguf_header import is_gguf
from qzo_diffusion.quant.load import codes_fingerprint, handles_of, quantize_
from qzo_diffusion.quant.unquantized import unquantized_of
from qzo_diffusion.quant.weights import read_entries
from qzo_diffusion.runs import build
from qzo_diffusion.runs.llm.transforms import Maps, load_transformed
from qzo_diffusion.runs.loading import Source, load_quantized
from qzo_diffusion.train.first_order import first_order_step
from qzo_diffusion.train.loop import TakeStep


@dataclass(frozen=True)
class Base:
    """A model with the theta of a method, as both are before a run.

    codes, initial: hashes of the frozen and of the trained tensors. take_step: None is the
    zeroth-order step. trained: names of the layers whose scales or codes are trained, and of
    unquantized tensors; empty for other methods.
    """

    lm: CausalLm
    scales: ScaleSet
    theta: Parametrization
    optimizer: Any
    codes: str
    initial: str
    take_step: TakeStep | None = None
    trained: Sequence[str] = ()
    maps: Maps | None = None


def load_base(
    config: LlmConfig,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    run: Path | None = None,
) -> Base:
    """Load the model of a run.

    Args:
        run: the folder of a run that is there already, which holds what it learned before its first
            step.

    Raises:
        ModelError: it can't be loaded or quantized, or the method can't train its format.
    """
    _check_format(config, folder)
    maps = _maps(config, folder, run)
    lm = _load(config, folder, maps, device, dtype)
    if config.method == "mezo":
        lm.model.to(device)
        layers = _layers(
            config,
            [
                name
                for name, _ in linears_to_quantize(
                    lm.model, config.quant.skip, config.quant.blocksize
                )
            ],
        )
        weights = baselines.mezo_theta(lm.model, layers)
        return Base(
            lm,
            weights.scales,
            weights,
            build.optimizer(config),
            "unquantized",
            _hash(weights.scales),
        )
    if config.method == "quzo-lora":
        return _quzo_adapters(config, lm, device)
    _quantize_(config, lm, device)
    if config.method == "qlora":
        layers = _layers(config, [handle.name for handle in handles_of(lm.model)])
        baselines.add_lora_(
            lm.model, layers, rank=config.lora.rank, alpha=config.lora.alpha, seed=config.train.seed
        )
        adapters = baselines.lora_theta(lm.model)
        step = first_order_step(baselines.lora_gradient(lm.model))
        return Base(
            lm,
            adapters.scales,
            adapters,
            build.adam(config),
            codes_fingerprint(lm.model),
            _hash(adapters.scales),
            step,
        )
    beside = unquantized_of(lm.model, config.qzo.unquantized)
    scales, theta = build.scales_and_theta(config, lm.model, beside)
    codes, initial = build.fingerprints(lm.model, scales)
    trained = tuple(build.trained_of(scales, config.qzo.layers))
    take_step: TakeStep | None = None
    optimizer = build.optimizer(config)
    if config.method == "fo-scales":
        optimizer, take_step = build.first_order(config, lm.model)
    return Base(lm, scales, theta, optimizer, codes, initial, take_step, trained, maps)


def _layers(config: LlmConfig, names: Sequence[str]) -> list[str]:
    """Return the layers of `qzo.layers`, all without that setting, for methods that train no
    scales.

    Raises:
        ConfigError: no layer matches.
    """
    if not names:
        raise nothing_to_quantize(config.quant.skip, config.quant.blocksize)
    found = chosen(names, config.qzo.layers)
    if not found:
        remedy = "correct qzo.layers, or give null for all layers"
        raise ConfigError(
            f"qzo.layers = {config.qzo.layers}: no such layer",
            f"parts of names like {names[0]}",
            remedy,
        )
    return found


UNDER_LORA = (None, "bitsandbytes")  # formats of folders that peft can adapt


def _check_format(config: LlmConfig, folder: Path) -> None:
    method = stored_method(folder)
    if config.quant.transform != "none" and method is not None:
        raise ModelError(
            f"quant.transform={config.quant.transform} on {folder}, stored as {method}",
            "a folder that is not quantized: codes can't be mapped",
            "give the model that it was made of, or use quant.transform=none",
        )
    if config.method == "qlora" and method not in UNDER_LORA:
        got, remedy = (
            f"--method qlora on {folder}, stored as {method}",
            "use --method qzo, or the model that it was made of",
        )
        raise ModelError(
            got, "a plain folder, or one of bitsandbytes: peft knows no other layers", remedy
        )
    if config.method == "mezo" and method is not None:
        got, remedy = (
            f"--method mezo on {folder}, stored as {method}",
            "give the model that it was made of, or use --method qzo",
        )
        raise ModelError(
            got, "a folder that is not quantized: mezo trains the weights themselves", remedy
        )
    if config.qzo.unquantized != "none" and is_gguf(folder):
        got = f"qzo.unquantized={config.qzo.unquantized} with {folder.name}"
        raise ModelError(
            got,
            "qzo.unquantized=none: only factors of blocks go back into a GGUF file",
            "leave it out",
        )


def _maps(config: LlmConfig, folder: Path, run: Path | None) -> Maps | None:
    if config.quant.transform == "none":
        return None
    return Maps(
        config.quant.transform,
        build.quantization(config.quant),
        folder,
        Path(config.quant.calibration or ""),
        cache=build.cache_folder(config) / "transforms",
        run=run,
    )


def _load(
    config: LlmConfig,
    folder: Path,
    maps: Maps | None,
    device: torch.device,
    dtype: torch.dtype,
) -> CausalLm:
    """Load the model. If the method needs it and the folder is not quantized, it is quantized while
    it is read.
    """
    plain = stored_method(folder) is None and config.method not in ("mezo", "quzo-lora")
    if not plain or (config.quant.backend == "bnb" and config.quant.type == "int8"):
        return load_causal_lm(folder, dtype)
    how, cache = build.quantization(config.quant), build.copies_folder(config)

    def read(place: Path) -> nn.Module:
        source = Source(read_entries(place), lambda: empty_causal_lm(place, dtype))
        if maps is not None:
            return load_transformed(source, how, maps, dtype, device)
        return load_quantized(source, how, dtype=dtype, device=device, cache=cache)

    return load_causal_lm(folder, dtype, read)


def _quantize_(
    config: LlmConfig, lm: CausalLm, device: torch.device, also_skipped: Sequence[str] = ()
) -> None:
    if not any(True for _ in handles_of(lm.model)):  # a quantized folder stays as it is
        quantize_(
            lm.model,
            quant_type=config.quant.type,
            blocksize=config.quant.blocksize,
            skip=[*config.quant.skip, *also_skipped],
            backend=config.quant.backend,
            activations=config.quant.activations,
            device=device,
        )
    lm.model.to(device)


def _quzo_adapters(config: LlmConfig, lm: CausalLm, device: torch.device) -> Base:
    """Build QuZO's second mode: adapters first, then quantize the layers under them.

    peft knows plain layers only.
    """
    if any(True for _ in handles_of(lm.model)):
        raise ModelError(
            "a folder that is quantized already",
            "an unquantized one for quzo-lora",
            "give the model it was made of",
        )
    layers = _layers(
        config, [name for name, _ in linears_to_quantize(lm.model, config.quant.skip, 1)]
    )
    baselines.add_lora_(
        lm.model, layers, rank=config.lora.rank, alpha=config.lora.alpha, seed=config.train.seed
    )
    _quantize_(config, lm, device, also_skipped=("lora_A", "lora_B"))
    adapters = baselines.lora_theta(lm.model)
    return Base(
        lm,
        adapters.scales,
        adapters,
        build.optimizer(config),
        codes_fingerprint(lm.model),
        _hash(adapters.scales),
    )


def apply_(base: Base, tuned: Mapping[str, Tensor], facts: Mapping[str, str], run: Path) -> None:
    """Turn the model into the one that a run left.

    Raises:
        ModelError: the run was over another base or by another method.
    """
    live = base.scales.tensors()
    fits = facts.get("qzo.codes") == base.codes and tuned.keys() == live.keys()
    if not fits or any(tensor.shape != tuned[name].shape for name, tensor in live.items()):
        raise ModelError(
            f"{run} was tuned on {facts.get('qzo.model', 'an unknown model')} by "
            f"{facts.get('qzo.method', 'an unknown method')}",
            "a run of the same model, quantization and method",
            "leave --model and the settings to the run",
        )
    check_numbers(base.scales, tuned)
    for name, tensor in live.items():
        tensor.copy_(tuned[name])


def _hash(scales: ScaleSet) -> str:
    return fingerprint(scales.tensors().items())
