"""Files with numbers: models, tuned scales, journals, checkpoints, caches."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.forged import forgeries as f
from benchmarks.forged.reader import Found, Reader, of_tensors
from qzo_diffusion.core.delta import expanded, shrunk
from qzo_diffusion.core.journal import JournalWriter, read_journal, replay_
from qzo_diffusion.core.journal_format import StepEntry
from qzo_diffusion.core.merge import check_fits
from qzo_diffusion.core.optimizer import make_optimizer
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.diffusion.cache import TensorCache
from qzo_diffusion.llm.causal_lm import load_causal_lm
from qzo_diffusion.llm.gguf_file import check_gguf
from qzo_diffusion.quant.stream import Quantization
from qzo_diffusion.quant.weights import read_entries
from qzo_diffusion.runs.loading import Source, load_quantized
from qzo_diffusion.runs.tuned import load_scales
from qzo_diffusion.system import files
from qzo_diffusion.train import checkpoint as checkpoints
from qzo_diffusion.train.run_folder import save_tensors
from tests.llm.gguf_files import write_gguf
from tests.quantized import scaled_network
from tests.tiny_llama import tiny_llama

SCALES_FILE, CHECKPOINT = f"final/{files.SCALES}", "checkpoints/step_000006"


def network() -> Any:
    return scaled_network("reference", width=128, out=64)[1]


def tuned() -> dict[str, Tensor]:
    return {name: scales * 1.1 for name, scales in network().tensors().items()}


def use_model(folder: Path) -> Found:
    return of_tensors({name: entry.read() for name, entry in read_entries(folder).items()})


def make_model(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layer.{i}.weight": torch.randn(16, 16, generator=generator) for i in range(4)}
    save_tensors(folder / "model.safetensors", tensors)


def make_gguf(folder: Path) -> None:
    write_gguf(folder / "model.gguf", tiny_llama())


def use_gguf(folder: Path) -> Found:
    check_gguf(folder / "model.gguf")
    lm = load_causal_lm(folder / "model.gguf", torch.float32)
    return of_tensors(dict(lm.model.state_dict()))


def make_scales(folder: Path) -> None:
    files.write_folder(
        folder / "final", lambda place: save_tensors(place / files.SCALES, tuned(), {"qzo.x": "y"})
    )


def make_delta(folder: Path) -> None:
    def write(place: Path) -> None:
        save_tensors(place / files.SCALES, shrunk(network(), tuned()))

    files.write_folder(folder / "final", write)


def use_scales(folder: Path) -> Found:
    tensors, facts = load_scales(folder / "final")
    check_fits(network(), tensors)
    found = of_tensors(tensors)
    return Found(found.numbers + repr(sorted(facts.items())).encode(), finite=found.finite)


def use_delta(folder: Path) -> Found:
    return of_tensors(expanded(network(), load_scales(folder / "final")[0]))


def renew_marker(folder: Path) -> None:
    for marker in folder.rglob(files.COMPLETE):
        names = [file.name for file in marker.parent.iterdir() if file != marker]
        hashes = {name: files.hash_of(marker.parent / name) for name in names}
        marker.write_text(json.dumps(hashes))


HEADER = {"directions": "rademacher", "seed": 3, "examples": None}
STEPS = [StepEntry(i, 3, 0.1, 0.01, 1.0 + i, (0.5, -0.25)) for i in range(6)]


def make_journal(folder: Path) -> None:
    writer = JournalWriter.create(folder / "journal.qzo", HEADER)
    for entry in STEPS:
        writer.append(entry)
    writer.close()


def use_journal(folder: Path) -> Found:
    """As right counts what any number of whole steps gives, if a torn tail is told."""
    journal = read_journal(folder / "journal.qzo")
    theta = parametrize(network(), "row")
    replay_(journal, theta, make_optimizer("adam"))
    return of_tensors(theta.state(), told=bool(journal.torn_bytes) or journal.steps_done < 6)


def make_checkpoint(folder: Path) -> None:
    theta, optimizer = parametrize(network(), "row"), make_optimizer("adam")
    make_journal(folder)
    replay_(read_journal(folder / "journal.qzo"), theta, optimizer)
    checkpoints.save_checkpoint(
        checkpoints.Checkpoint(folder / CHECKPOINT, 6, "ab"),
        theta,
        optimizer,
        metadata={"qzo.x": "y"},
    )


def use_checkpoint(folder: Path) -> Found:
    whole, problems = checkpoints.list_checkpoints(folder / "checkpoints")
    if not whole:
        return Found(b"", told=bool(problems))
    theta, optimizer = parametrize(network(), "row"), make_optimizer("adam")
    checkpoints.load_checkpoint_(whole[-1], theta, optimizer)
    found = of_tensors(theta.state() | optimizer.state())
    facts = repr((whole[-1].step, whole[-1].chain, whole[-1].validation_loss))
    return Found(found.numbers + facts.encode(), bool(problems), found.finite)


KEY = {"file": "ab12", "flip": False}


def make_cache(folder: Path) -> None:
    TensorCache(folder).put(KEY, {"latents": torch.arange(64.0).view(4, 4, 4)})
    next(folder.glob("*.safetensors")).rename(folder / "entry")


def use_cache(folder: Path) -> Found:
    """What is not there is computed again."""
    cache = TensorCache(folder)
    shutil.copyfile(folder / "entry", cache._path(KEY))
    found = cache.get(KEY)
    return Found(b"", told=True) if found is None else of_tensors(found)


def quantized_model(folder: Path) -> nn.Module:
    """From its 4-bit copy in `folder/cache`, which is made where there is none that is whole."""
    source = Source(
        read_entries(folder / "model.safetensors"), lambda: nn.Sequential(nn.Linear(64, 64))
    )
    quantization = Quantization("nf4", 64, ())
    return load_quantized(
        source,
        quantization,
        dtype=torch.float32,
        device=torch.device("cpu"),
        cache=folder / "cache",
        smallest_cached=0,
    )


def make_copy(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(64, 64, generator=generator), torch.zeros(64)
    save_tensors(folder / "model.safetensors", {"0.weight": weight, "0.bias": bias})
    (folder / "cache").mkdir(mode=0o700)
    quantized_model(folder)
    (stored,) = (folder / "cache").iterdir()
    shutil.copyfile(stored / "model.safetensors", folder / "copied")


def use_copy(folder: Path) -> Found:
    (stored,) = (folder / "cache").iterdir()
    shutil.copyfile(folder / "copied", stored / "model.safetensors")
    # what is damaged is made again, from the same source
    return of_tensors(dict(quantized_model(folder).state_dict()))


def readers() -> list[Reader]:
    numbers = [
        Reader("model.safetensors", "model.safetensors", make_model, use_model, f.SAFETENSORS),
        Reader("model.gguf", "model.gguf", make_gguf, use_gguf, f.BYTES),
        Reader("scales", SCALES_FILE, make_scales, use_scales, f.SAFETENSORS, protected=True),
        Reader(
            "scales, hashed anew",
            SCALES_FILE,
            make_scales,
            use_scales,
            f.SAFETENSORS,
            renew=renew_marker,
        ),
        Reader("delta", SCALES_FILE, make_delta, use_delta, f.SAFETENSORS, renew=renew_marker),
        Reader("marker", "final/COMPLETE", make_scales, use_scales, f.JSON, protected=True),
        Reader("journal", "journal.qzo", make_journal, use_journal, f.BYTES, protected=True),
        Reader("4-bit copy", "copied", make_copy, use_copy, f.SAFETENSORS, protected=True),
        Reader("cache", "entry", make_cache, use_cache, f.SAFETENSORS, protected=True),
    ]
    for name in ("numbers.safetensors", "optimizer.safetensors", "state.json"):
        forge = f.JSON if name == "state.json" else f.SAFETENSORS
        place = f"{CHECKPOINT}/{name}"
        numbers += [
            Reader(name, place, make_checkpoint, use_checkpoint, forge, protected=True),
            Reader(
                f"{name}, hashed anew",
                place,
                make_checkpoint,
                use_checkpoint,
                forge,
                renew=renew_marker,
            ),
        ]
    return numbers
