"""Numbers that no run writes, and files forged with right checksums."""

import json
import math
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qzo_diffusion.cli import main
from qzo_diffusion.core.delta import expanded, shrunk
from qzo_diffusion.core.errors import JournalError, ModelError, OutputError
from qzo_diffusion.core.journal import JournalWriter, read_journal, replay_
from qzo_diffusion.core.journal_format import StepEntry
from qzo_diffusion.core.merge import merge_changes_
from qzo_diffusion.llm.causal_lm import load_causal_lm
from qzo_diffusion.quant.weights import read_entries
from qzo_diffusion.runs.tuned import load_scales
from qzo_diffusion.system import files
from qzo_diffusion.system.files import COMPLETE, write_folder
from qzo_diffusion.system.reading import TooMuch, parse_json, read_json, read_json_lines
from qzo_diffusion.train.checkpoint import read_checkpoint
from qzo_diffusion.train.run_folder import load_tensors
from tests.conftest import failing
from tests.quantized import scaled_network
from tests.tiny_llama import save_tiny_llama


def forged(folder, change):
    """Change the tensors of a folder and write its marker anew, so that its hashes are right."""
    for file in folder.glob("*.safetensors"):
        tensors, facts = load_tensors(file)
        change(tensors)
        save_file(tensors, file, facts | {"format": "pt"})
    hashes = json.loads((folder / COMPLETE).read_text())
    hashes = {name: files.hash_of(folder / name) for name in hashes}
    (folder / COMPLETE).write_text(json.dumps(hashes))


def first_is(value):
    def change(tensors):
        for tensor in tensors.values():
            if tensor.is_floating_point() and tensor.numel():
                tensor.view(-1)[0] = value

    return change


@pytest.fixture(params=[math.nan, math.inf], ids=["nan", "inf"])
def bad_run(run, tmp_path, request):
    copy = shutil.copytree(run, tmp_path / "bad")
    for folder in (copy / "final", copy / "checkpoints" / "step_000001"):
        forged(folder, first_is(request.param))
    return copy


def test_every_verb_refuses_scales_that_are_not_finite(run, bad_run, tmp_path, capsys):
    out, images, run = str(tmp_path / "out"), str(run.parent / "imgs"), str(bad_run)
    for arguments in (
        ["sample", "--run", run, "--output-dir", out],
        ["sample", "--run", f"{run}/checkpoints/step_000001", "--output-dir", out],
        ["sample", "--run", f"{run}/final/scales.safetensors", "--output-dir", out],
        ["mix", "--run", f"{run}=0.5", "--output-dir", out],
        ["evaluate", "--run", run],
        ["train", "--dry-run", "--init-from", run, "--style-dir", images, "--caption", "x"],
        *(
            ["export", "--run", run, "--format", kind, "--output-dir", out]
            for kind in ("nf4", "bf16", "delta", "native")
        ),
    ):
        assert "not finite" in failing(capsys, main(arguments))
        assert not os.path.exists(out)


def test_a_checkpoint_that_is_not_finite_does_not_go_on(bad_run, capsys):
    shutil.rmtree(bad_run / "final")
    assert "not finite" in failing(
        capsys, main(["train", "--resume", str(bad_run), "train.max_steps=2", "--force"])
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0])
def test_merging_refuses_numbers_that_no_scale_has(value):
    _, scales = scaled_network("reference", width=512, out=64)
    tuned = {name: one.clone() for name, one in scales.tensors().items()}
    tuned["2"].view(-1)[3] = value
    for use in (lambda: merge_changes_(scales, [(tuned, 1.0)]), lambda: shrunk(scales, tuned)):
        with pytest.raises(ModelError, match="in 2"):
            use()


def test_a_weight_that_makes_scales_infinite_is_refused():
    _, scales = scaled_network("reference", width=512, out=64)
    tuned = {name: one * 2 for name, one in scales.tensors().items()}
    with pytest.raises(ModelError, match="smaller ones"):
        merge_changes_(scales, [(tuned, 1e4)])


@pytest.mark.parametrize(
    "forgery",
    [
        {"2:row": torch.full((1, 1), math.nan)},
        {"2:row": torch.full((1, 1), -1.0)},
        {"2:row": torch.full((1, 1), 3e38), "2:column": torch.full((1, 8), 3e38)},
        {"2:row": torch.ones(1, 2**20)},  # not broadcast into gigabytes
        {"2:ulps": torch.zeros(64, 8, dtype=torch.int32)},
        {"2:scales": torch.ones(512, dtype=torch.float64)},
        {"2:other": torch.ones(1)},
    ],
)
def test_forged_deltas_are_refused(forgery):
    _, scales = scaled_network("reference", width=512, out=64)
    with pytest.raises(ModelError):
        expanded(scales, forgery)


def journal(path, entries, **header):
    writer = JournalWriter.create(path, {"directions": "rademacher"} | header)
    for entry in entries:
        writer.append(entry)
    writer.close()
    return path


def step(lr=0.1, grads=(0.5, 0.5)):
    return StepEntry(0, 3, lr, 0.01, 1.0, tuple(grads))


@pytest.mark.parametrize("entry", [step(lr=math.nan), step(grads=(1, math.inf)), step(grads=())])
def test_a_step_that_is_not_finite_is_refused(tmp_path, entry):
    with pytest.raises(JournalError, match="step 0"):
        read_journal(journal(tmp_path / "j", [entry]))


@pytest.mark.parametrize(
    "header",
    [{"examples": 10**9}, {"examples": -2}, {"examples": "2"}, {"directions": ["x"]}],
)
def test_counts_of_a_journal_are_checked_before_directions_are_drawn(tmp_path, header):
    found = read_journal(journal(tmp_path / "j", [step()], **header))
    with pytest.raises(JournalError, match="a journal with"):
        replay_(found, None, None)


@pytest.mark.parametrize("payload", [b"[" * 60000, b"[]", b"\xff", b"1" * 50000])
def test_a_header_that_is_no_mapping_of_facts_is_refused(tmp_path, payload, monkeypatch):
    monkeypatch.setattr("qzo_diffusion.core.journal.to_json", lambda content: payload)
    with pytest.raises(JournalError, match="the header"):
        read_journal(journal(tmp_path / "j", []))


@pytest.mark.parametrize(
    "text",
    ["[" * 10**5, '{"a":' * 10**5, '{"a": 1, "a": 2}', "1" * 10**4, '"' * 10**6, '"\\' * 10**6],
)
def test_json_that_no_run_writes_is_refused(tmp_path, text):
    (tmp_path / "file").write_text(text)
    with pytest.raises(ValueError):  # noqa: PT011, of whichever check
        read_json(tmp_path / "file")


def test_more_values_or_bytes_than_the_limit_are_refused(tmp_path):
    with pytest.raises(TooMuch, match="values"):
        parse_json("[" + "[]," * 2_100_000 + "[]]")
    (tmp_path / "file").write_bytes(b" " * 100)
    with pytest.raises(TooMuch, match="bytes"):
        read_json(tmp_path / "file", most=99)
    (tmp_path / "lines").write_bytes(b"1\n" + b" " * 2**21)
    with pytest.raises(TooMuch, match="a line"):
        list(read_json_lines(tmp_path / "lines"))


def test_brackets_within_texts_do_not_count():
    deep = "[" * 1000 + '\\"{'
    assert parse_json(json.dumps([deep])) == [deep]


@pytest.mark.parametrize(
    "state",
    [
        {"step": 1e400, "chain": "", "validation_loss": None},
        {"step": -5, "chain": "", "validation_loss": None},
        {"step": [], "chain": "", "validation_loss": None},
        [[1]],
    ],
)
def test_a_forged_state_is_refused(tmp_path, state):
    def write(folder):
        (folder / "state.json").write_text(json.dumps(state))

    with pytest.raises(OutputError, match="damaged"):
        read_checkpoint(write_folder(tmp_path / "step_000001", write))


def test_a_header_longer_than_any_run_s_is_not_parsed(tmp_path):
    file = tmp_path / "scales.safetensors"
    length = 2**25
    file.write_bytes(length.to_bytes(8, "little") + b"{" + b" " * (length - 2) + b"}")
    with pytest.raises(OutputError, match="a header of"):
        load_tensors(file)


def test_a_damaged_file_is_found_also_when_it_is_named_itself(run, tmp_path):
    folder = shutil.copytree(run / "final", tmp_path / "final")
    file = folder / "scales.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(OutputError, match="damaged"):
        load_scales(file)
    (folder / "scales.safetensors").unlink()
    (folder / "scales.safetensors").mkdir()  # a folder by the name of a file
    with pytest.raises(OutputError):
        load_scales(folder)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_with_a_weight_that_is_not_finite_is_refused(tmp_path, value, dtype):
    weight = torch.ones(64, 64, dtype=dtype)
    weight[3, 5] = value
    save_file({"layer.weight": weight}, tmp_path / "model.safetensors")
    (entry,) = read_entries(tmp_path).values()
    with pytest.raises(ModelError, match="not finite"):
        entry.read()


def test_a_language_model_with_a_weight_that_is_not_finite_is_refused(tmp_path):
    save_tiny_llama(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.norm\.weight holds numbers"):
        load_causal_lm(tmp_path, torch.float32)


def test_a_tensor_of_more_dimensions_than_torch_takes_is_refused(tmp_path):
    save_file({"0": torch.ones(1)}, tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(b'"shape":[1]', b'"shape":[%s]' % b",".join([b"1"] * 99))
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    with pytest.raises(OutputError, match="dimensions"):
        load_tensors(tmp_path / "file")


def test_a_few_forgeries_of_every_reader(tmp_path):
    """`benchmarks/hostile.py` makes 2,000."""
    import random

    from benchmarks.forged import numbers, texts
    from benchmarks.hostile import Bench

    (tmp_path / "work").mkdir()
    bench = Bench(tmp_path / "work", random.Random(7))
    for reader in numbers.readers() + texts.readers():
        if reader.name != "model.gguf":  # which takes a quarter of a second each
            list(bench.run(reader, 4))
    assert bench.failures == []
    assert bench.counts["refused"] > sum(bench.counts.values()) / 3
