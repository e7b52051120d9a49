"""Keep the pictures that an evaluation scores, so that another scorer sees the same ones."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import nn

from qzo_diffusion.config.style import Config
from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.diffusion.prompts import Prompts
from qzo_diffusion.diffusion.sampling import load_picture
from qzo_diffusion.runs import build
from qzo_diffusion.runs.style import pipeline
from qzo_diffusion.runs.style.batches import Encoded
from qzo_diffusion.system.console import report
from qzo_diffusion.system.files import write_folder
from qzo_diffusion.system.reading import read_json
from qzo_diffusion.train.run_folder import RunFolder


class Plan(Protocol):
    """What pictures depend on, of a plan."""

    @property
    def config(self) -> Config: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def prompts(self) -> Prompts: ...

    @property
    def runtime(self) -> pipeline.Runtime: ...


class Work(Protocol):
    """A model with base or tuned scales. `sampled` is the same, as pictures are made with it."""

    @property
    def plan(self) -> Plan: ...

    @property
    def encoded(self) -> Encoded: ...

    @property
    def transformer(self) -> nn.Module: ...

    @property
    def sampled(self) -> nn.Module: ...

    @property
    def scales(self) -> ScaleSet: ...


@dataclass(frozen=True)
class Kept:
    """Pictures by state: `own` holds those of the run's end, `part` those of one of its
    checkpoints.

    The base's pictures of a checkpoint are often the run's own, which are not drawn again.
    """

    own: Path
    part: Path

    def draw(self, work: Work, state: str) -> list[Image.Image]:
        """Return pictures of all prompts from the scales as they are; draw them unless they are
        kept.
        """
        key, files = _key(work), [f"{index:03d}.png" for index in range(_count(work))]
        target = self.own / state
        if not _kept(target, key, files):
            target = self.part / state
        if not _kept(target, key, files):
            _draw(work, state, target, key, files)
        return [load_picture(target / file) for file in files]


def _count(work: Work) -> int:
    return len(work.plan.prompts.texts)


def _key(work: Work) -> str:
    """Return a hash of everything that the pictures depend on."""
    config, plan = work.plan.config, work.plan
    size, dtype = config.data.resolution, str(plan.dtype)
    prompts = [*plan.prompts.texts, *plan.prompts.negatives]
    shown = [prompts, config.sample.model_dump(), size, dtype]
    scales = build.fingerprints(work.transformer, work.scales)
    text = json.dumps([shown, scales], default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _draw(work: Work, state: str, target: Path, key: str, files: Sequence[str]) -> None:
    plan, encoded = work.plan, work.encoded
    sampler = pipeline.sampler(
        plan.config,
        plan.runtime,
        work.sampled,
        encoded.vae,
        plan.prompts.prompts,
        encoded.prompts,
    )
    report(f"sampling {len(files)} pictures: {state}")
    images = sampler.images()

    def write(aside: Path) -> None:
        for image, file in zip(images, files, strict=True):
            image.save(aside / file)
        pairs = zip(files, plan.prompts.prompts, strict=True)
        table = [{"file": file, **prompt.row} for file, prompt in pairs]
        RunFolder(aside).write_json("prompts.json", table)
        RunFolder(aside).write_json("key.json", key)

    write_folder(target, write)


def _kept(target: Path, key: str, files: Sequence[str]) -> bool:
    try:
        same = read_json(target / "key.json") == key
    except (OSError, ValueError):
        return False
    return bool(same) and all((target / file).is_file() for file in files)
