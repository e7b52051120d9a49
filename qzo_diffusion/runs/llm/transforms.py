"""Load a language model whose layers' inputs are mapped before it is quantized.

Maps that are learned are kept twice: in the cache, for the next run with the same model, text and
quantization, and in the run's folder, so that the run goes on bit for bit anywhere."""

import contextlib
import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from qzo_diffusion.core.errors import OutputError
from qzo_diffusion.llm import flatquant, kurtail
from qzo_diffusion.llm.calibration import read_text, windows_of
from qzo_diffusion.llm.causal_lm import load_causal_lm
from qzo_diffusion.llm.decoder import HEAD, Decoder, decoder_of
from qzo_diffusion.llm.transform import Transform, install_, rotated, transformed_entries
from qzo_diffusion.quant.fits import check_fits, named_as_in
from qzo_diffusion.quant.hadamard import hadamard_map
from qzo_diffusion.quant.stream import Quantization
from qzo_diffusion.quant.weights import weight_files
from qzo_diffusion.runs.loading import Source, load_quantized
from qzo_diffusion.system.console import report
from qzo_diffusion.system.files import write_whole
from qzo_diffusion.train.run_folder import load_tensors

FILE = "transform.safetensors"
FORMAT = 1  # raise it when the same text gives other maps


def load_transformed(
    source: Source, how: Quantization, maps: "Maps", dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """Load the model quantized, as `load_quantized` does. No copy of it is kept on disk.

    Raises:
        ModelError: it is no decoder of a known kind, or see `quant.stream.fill_`.
    """
    empty = source.make_empty()
    entries = named_as_in(empty, source.entries)
    check_fits(empty, entries)
    transform = maps.of(decoder_of(empty, tied=f"{HEAD}.weight" not in entries))
    changed = replace(source, entries=transformed_entries(entries, transform))
    model = load_quantized(changed, how, dtype=dtype, device=device)
    install_(model, transform, dtype)
    return model


class Maps:
    """The maps of a run.

    Args:
        how: the quantization that FlatQuant's maps are fitted to.
        calibration: the text that is learned from; not read where the maps are known already.
        cache: the folder of learned maps.
        run: the folder of a run that goes on or is evaluated, whose own maps are taken.
    """

    def __init__(
        self,
        kind: str,
        how: Quantization,
        model: Path,
        calibration: Path,
        *,
        cache: Path,
        run: Path | None,
    ) -> None:
        self._kind, self._how, self._model = kind, how, model
        self._calibration, self._cache, self._run = calibration, cache, run
        self._learned: dict[str, Tensor] = {}

    def of(self, sizes: Decoder) -> Transform:
        """Return the transform of a model of these sizes.

        Raises:
            DataError: there is no text to learn from, or it is too short.
            OutputError: the run's own maps are damaged.
        """
        if self._kind == "hadamard":
            return hadamard(sizes)
        self._learned = self._known() or self._learn(sizes)
        made = kurtail.transform if self._kind == "kurtail" else flatquant.transform
        try:
            return made(sizes, self._learned)
        except KeyError as error:
            raise OutputError(
                f"{FILE} without {error}",
                f"the maps of {self._kind} for this model",
                "restore the run's folder",
            ) from None

    def keep_in(self, run: Path) -> None:
        """Write the learned maps into the folder of a run. Raises OutputError."""
        if self._learned and not (run / FILE).exists():
            write_whole(run / FILE, save(self._learned))

    def _known(self) -> dict[str, Tensor] | None:
        if self._run is not None and (self._run / FILE).is_file():
            return load_tensors(self._run / FILE)[0]
        if (kept := self._place_in_cache()).is_file():
            with contextlib.suppress(OutputError):
                return load_tensors(kept)[0]
        return None

    def _learn(self, sizes: Decoder) -> dict[str, Tensor]:
        text = read_text(self._calibration)
        report(f"{self._kind}: maps are learned on {self._calibration}, which takes minutes")
        whole = load_causal_lm(self._model, torch.float32)  # whatever the run computes in
        windows = windows_of(whole.encode(text))
        found = (
            kurtail.learned(sizes, whole.model, windows)
            if self._kind == "kurtail"
            else flatquant.learned(sizes, whole.model, windows, rounding_of(self._how))
        )
        with contextlib.suppress(OutputError, OSError):  # the run's folder holds them as well
            self._cache.mkdir(parents=True, exist_ok=True)
            write_whole(self._place_in_cache(), save(found))
        return found

    def _place_in_cache(self) -> Path:
        facts: dict[str, Any] = {
            "format": FORMAT,
            "kind": self._kind,
            "text": read_text(self._calibration),
            "files": [
                [file.name, file.stat().st_size, file.stat().st_mtime_ns]
                for file in weight_files(self._model)
            ],
        }
        if self._kind == "flatquant":
            facts["rounding"] = asdict(rounding_of(self._how))
        text = json.dumps(facts, sort_keys=True)
        name = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        return self._cache / f"{name}.safetensors"


def hadamard(sizes: Decoder) -> Transform:
    """Return the rotations by randomized Hadamard matrices, the same ones for every run."""
    heads = [hadamard_map(sizes.head).matrix()] * sizes.blocks
    return rotated(sizes, hadamard_map(sizes.width), heads, hadamard_map(sizes.inner))


def rounding_of(how: Quantization) -> flatquant.Rounding:
    """Return the rounding that maps are fitted to: 4 bits, and of inputs where they have 4."""
    of_token = 0 if how.backend == "intgrid" else how.blocksize
    return flatquant.Rounding(how.blocksize, of_token if how.activations == "int4" else None)
