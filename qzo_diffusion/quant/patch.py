"""Saves tuned scales into a copy of their checkpoint; all other tensors are copied.

`save_pretrained` corrupts GPTQ models: it converts the zeros and leaves their label. It also loses
tuned scales. A copy with other scales loads wherever the original does."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qzo_diffusion.core.errors import ModelError


def patch_folder(source: Path, target: Path, tensors: Mapping[str, Tensor]) -> None:
    """Copy the files of `source` into the folder `target`, with other values of the named tensors,
    in the dtype that they had.

    Raises:
        ModelError: the checkpoint has no such tensor, or one of another shape.
    """
    left = dict(tensors)
    for file in sorted(source.iterdir()):
        if file.is_dir():
            continue
        if file.suffix != ".safetensors":
            shutil.copyfile(file, target / file.name)
            continue
        with safe_open(file, "pt") as handle:
            content = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            facts = handle.metadata()
        for name in content.keys() & left.keys():
            new, old = left.pop(name), content[name]
            if new.shape != old.shape:
                raise ModelError(
                    f"{name} is {tuple(new.shape)}",
                    f"{tuple(old.shape)}, as in {file.name}",
                    "give the run's own base model",
                )
            content[name] = new.to(old.dtype).contiguous()
        save_file(content, target / file.name, facts)
    if left:
        raise ModelError(
            f"{source} without {next(iter(left))}",
            "the checkpoint that was tuned",
            "give the run's own base model",
        )
