"""Checks that files hold a model: every tensor in its shape, and no other tensor that changes one.

The checks read names and headers alone, so a run is refused before anything is loaded."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.quant import bnb, sdnq
from qzo_diffusion.quant.entries import Entry

AGAIN = "download the model again, with all its parts"


def check_fits(model: nn.Module, entries: Mapping[str, Entry]) -> list[str]:
    """The names that the model has no place for and that mean nothing for it.

    Args:
        model: its weights on the meta device, names as in `entries` (see `named_as_in`).

    Raises:
        ModelError: a tensor is missing, of another shape, or belongs to a tensor that is used.
    """
    slots = slots_of(model)
    filled = _filled(model, entries, slots)
    missing = [name for name, slot in slots.items() if slot.is_meta and name not in filled]
    if missing:
        raise missing_error(missing)
    for target, source in filled.items():
        _check_tensor(model, target, slots[target], source, entries)
    unused = [
        name
        for name in entries
        if name not in filled.values()
        and not bnb.belongs_to_a_weight(name, entries)
        and not sdnq.belongs_to_a_weight(name, entries)
    ]
    refuse_kin(unused, filled, model)
    return unused


def missing_error(missing: Iterable[str]) -> ModelError:
    names = list(missing)
    return ModelError(
        f"{len(names)} tensors of the model are not in its files, for example {names[0]}",
        "weights of the model that its config describes",
        AGAIN,
    )


def check_loaded(model: nn.Module, facts: Mapping[str, Any]) -> None:
    """Check the loading info that transformers returns for `output_loading_info=True`.

    Raises ModelError for a tensor that is missing, of another shape, or belongs to a used one.
    """
    if missing := sorted(facts.get("missing_keys") or ()):
        raise missing_error(missing)
    for name, there, wanted in sorted(facts.get("mismatched_keys") or (), key=str):
        raise ModelError(
            f"{name} has the shape {tuple(there)}",
            f"{tuple(wanted)}, as the model's config says",
            "give weights and config of one model",
        )
    if errors := facts.get("error_msgs"):
        raise ModelError(str(next(iter(errors)))[:300], "weights that can be read", AGAIN)
    refuse_kin(sorted(facts.get("unexpected_keys") or ()), slots_of(model), model)


def refuse_kin(unused: Iterable[str], used: Iterable[str], model: Any) -> None:
    """Raises ModelError for a tensor without a place that belongs to one that is used: a scale
    beside a weight, a bias that the config denies, a layer beyond those of the config.
    """
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    names = set(used)
    layers = {name.rpartition(".")[0] for name in names} - {""} | names
    numbered = {_without_numbers(name) for name in names}
    for name in unused:
        if any(re.search(pattern, name) for pattern in ignored):
            continue
        owner = next((one for one in _ancestors(name) if one in layers), None)
        if owner is not None:
            raise ModelError(
                f"{name}, a tensor beside {owner} that the model has no place for",
                "weights that are complete by themselves; scales that are understood are one for "
                "a tensor, for each row or for each block, of weights in 8 bits",
                "use the model in bf16 or fp16, with its own config.json",
            )
        if _without_numbers(name) in numbered and _without_numbers(name) != name:
            raise ModelError(
                f"{name}, a tensor of a layer that the model's config does not have",
                "as many layers as the config describes",
                "give weights and config of one model",
            )


def named_as_in(model: nn.Module, entries: Mapping[str, Entry]) -> Mapping[str, Entry]:
    """Return the tensors under the model's own names.

    Transformers renames layers between versions, and adds or drops a prefix for heads.
    """
    slots: dict[str, Any] = dict(slots_of(model))
    slots |= dict.fromkeys(getattr(model, "all_tied_weights_keys", None) or (), True)
    if not hasattr(model, "base_model_prefix") or all(
        _weight_of(name, entries) in slots for name in entries
    ):
        return entries
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [
        step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)
    ]

    def renamed(name: str) -> str:
        weight = _weight_of(name, entries)
        return rename_source_key(weight, renamings, [], model.base_model_prefix, slots)[
            0
        ] + name.removeprefix(weight)

    return {renamed(name): entry for name, entry in entries.items()}


def is_converted(model: nn.Module) -> bool:
    """Return whether transformers joins or splits tensors of the files on loading such a model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    steps = get_model_conversion_mapping(model)
    return any(not isinstance(step, WeightRenaming) for step in steps)


def slots_of(model: nn.Module) -> dict[str, Tensor]:
    """Every place of a tensor, by each of its names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


def tied_targets(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """Name in the files -> the places of the model that have no tensor of their own and take it."""
    there, found = set(names), dict[str, list[str]]()
    for target, source in dict(getattr(model, "all_tied_weights_keys", None) or {}).items():
        if target not in there:
            found.setdefault(source, []).append(target)
        elif source not in there:
            found.setdefault(target, []).append(source)
    return found


def _filled(
    model: nn.Module, entries: Mapping[str, Entry], slots: Mapping[str, Tensor]
) -> dict[str, str]:
    """Return place of the model -> name of the tensor on disk that fills it."""
    filled = {name: name for name in entries if name in slots}
    for source, targets in tied_targets(model, entries).items():
        if source in entries:
            filled |= {target: source for target in targets if target in slots}
    return filled


def _check_tensor(
    model: nn.Module, target: str, slot: Tensor, source: str, entries: Mapping[str, Entry]
) -> None:
    layer, entry = target.removesuffix(".weight"), entries[source]
    if target.endswith(".weight") and bnb.stored_state(layer, entries):
        return
    if entry.rotation is not None:
        if not isinstance(model.get_submodule(layer), nn.Linear):
            raise ModelError(
                f"{layer}, a layer that SDNQ quantized and that is no linear one",
                "codes of SDNQ in linear layers alone",
                "quantize the model again with modules_to_not_convert, or give it in bf16",
            )
        return
    if entry.shape != tuple(slot.shape):
        raise ModelError(
            f"{source} has the shape {entry.shape}",
            f"{tuple(slot.shape)}, as the model's config says",
            "give weights and config of one model",
        )
    is_linear = target.endswith(".weight") and isinstance(model.get_submodule(layer), nn.Linear)
    if entry.blocks and not is_linear:
        raise ModelError(
            f"{source} in blocks of {entry.blocks}",
            "blocks in linear layers alone, and other tensors as F32, F16 or BF16",
            "give a file that ComfyUI-GGUF's tools wrote, or the model as safetensors",
        )
    if entry.lacks_scale and is_linear:
        raise ModelError(
            f"{source} in 8 bits without a scale, in a file whose weights have scales",
            "a scale for each such weight",
            "download the file again, or use the model in bf16 or fp16",
        )


def _ancestors(name: str) -> Iterable[str]:
    """a.b.c -> a.b, a"""
    while name := name.rpartition(".")[0]:
        yield name


def _without_numbers(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)


def _weight_of(name: str, entries: Mapping[str, Entry]) -> str:
    """The weight that a scale, codebook or description of a 4-bit layer belongs to; else `name`."""
    return (
        f"{name.rpartition('.weight.')[0]}.weight"
        if bnb.belongs_to_a_weight(name, entries)
        else name
    )
