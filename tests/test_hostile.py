"""Numbers that no run writes, files forged with right checksums, and commands that were killed."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys

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
from qzo_diffusion.system.files import COMPLETE, UNFINISHED, check_empty, unfinished, write_folder
from qzo_diffusion.system.reading import TooMuch, parse_json, read_json, read_json_lines
from qzo_diffusion.train.checkpoint import read_checkpoint
from qzo_diffusion.train.run_folder import RunFolder, load_tensors
from tests.conftest import failing
from tests.quantized import scaled_network
from tests.tiny_llama import save_tiny_llama


@pytest.fixture(scope="module")
def run(tmp_path_factory, pipeline):
    """A finished run of one step on a small random model, its prompts beside it."""
    from PIL import Image

    place = tmp_path_factory.mktemp("hostile")
    (place / "imgs").mkdir()
    for index in range(2):
        Image.new("RGB", (64, 64), (90 * index, 0, 50)).save(place / "imgs" / f"{index}.png")
    (place / "prompts.txt").write_text("red apple\n")
    arguments = ["train", "--model", str(pipeline), "--style-dir", str(place / "imgs")]
    arguments += ["--max-steps", "1"]
    arguments += [
        "--output-dir",
        str(place / "run"),
        "--sample-prompts",
        str(place / "prompts.txt"),
    ]
    arguments += [f"data.cache_dir={place / 'cache'}", "data.batch_size=1", "sample.steps=1"]
    arguments += ["sample.every=0", "train.validate_every=0", "train.checkpoint_every=1"]
    arguments += ["train.calibrate_lr=false", "compute.dtype=float32", "data.caption=a square"]
    assert main(arguments) == 0
    return place / "run"


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


def sampling(run, out):
    prompts = str(run.parent / "prompts.txt")
    return ["sample", "--run", str(run), "--prompts", prompts, "--output-dir", str(out)]


def verbs_that_write(run, out):
    journal = ["--journal", str(run / "journal.qzo")]
    return {
        "sample": sampling(run, out),
        "mix": ["mix", "--run", f"{run}=0.5", "--output-dir", str(out)],
        "replay": ["replay", *journal, "--output-dir", str(out)],
        "delta": ["export", "--run", str(run), "--format", "delta", "--output-dir", str(out)],
        "journal": ["export", "--run", str(run), "--format", "journal", "--output-dir", str(out)],
    }


@pytest.mark.parametrize("verb", ["sample", "mix", "replay", "delta", "journal"])
def test_the_same_command_again_replaces_what_a_kill_left(run, tmp_path, monkeypatch, verb):
    command, out = verbs_that_write(run, tmp_path / "out")[verb], tmp_path / "out"
    assert _stopped(lambda: main(command) == 130, monkeypatch, "kill", 1)
    assert not (out / "samples" / "000.png").exists() or (out / UNFINISHED).exists()
    assert main(command) == 0
    assert not [name for name in os.listdir(out) if name.startswith((".", UNFINISHED))]
    assert not list(tmp_path.glob(".*"))


def in_parts(out):
    """As mixes, replays and samples are written."""
    folder = RunFolder.create(out)
    with unfinished(out, ("config.yaml", "final", "samples")):
        folder.write_text("config.yaml", "a: 1")
        write_folder(out / "samples", lambda place: (place / "0.png").touch(), marked=False)
        folder.save_scales("final", {"0": torch.ones(1)}, {})


def at_once(out):
    """As exports are written."""
    write_folder(out, lambda folder: (folder / "model").write_text("weights"))


@pytest.mark.parametrize("write", [in_parts, at_once])
@pytest.mark.parametrize("kind", ["kill", "interrupt"])
def test_a_stop_at_any_moment_leaves_nothing_that_is_in_the_way(tmp_path, monkeypatch, kind, write):
    stops, out = 0, tmp_path / "0"
    while _stopped(lambda out=out: write(out), monkeypatch, kind, stops):
        if kind == "interrupt":
            assert not out.exists() or not set(os.listdir(out)) - {"samples"}
        assert not (out / "final").exists() or (out / UNFINISHED).exists()
        check_empty(out)
        write(out)
        assert not [name for name in os.listdir(out) if name.startswith((".", UNFINISHED))]
        assert not list(tmp_path.glob(".*"))
        stops, out = stops + 1, tmp_path / str(stops + 1)
    assert stops >= 2


def _stopped(command, monkeypatch, kind, stops):
    """Whether the command was stopped at its rename number `stops`; after a kill nothing is
    cleaned up.
    """
    replace, calls = os.replace, []

    def replace_or_stop(*places):
        calls.append(places)
        if len(calls) == stops + 1 or (kind == "kill" and len(calls) > stops):
            raise KeyboardInterrupt
        replace(*places)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_or_stop)
        if kind == "kill":
            patch.setattr(shutil, "rmtree", lambda *args, **named: None)
            patch.setattr(files, "clear_leftovers", lambda folder: None)
            patch.setattr("pathlib.Path.unlink", lambda *args, **named: None)
        try:
            return bool(command())
        except KeyboardInterrupt:
            return True


def test_a_command_that_was_killed_by_the_system(run, tmp_path):
    """By SIGKILL, while its pictures are written; the same command again is `sample` itself."""
    out = tmp_path / "out"
    script = (
        "import sys, time; from pathlib import Path\n"
        "from qzo_diffusion.system.files import unfinished, write_folder\n"
        "out = Path(sys.argv[1]); (out / 'samples').mkdir(parents=True)\n"
        "def write(folder):\n"
        "    (folder / '000.png').touch(); print('writing', flush=True); time.sleep(100)\n"
        "with unfinished(out, ['samples']): write_folder(out / 'samples', write, marked=False)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(out)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "writing\n"
    with pytest.raises(OutputError, match="another process writes"):
        check_empty(out)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (out / UNFINISHED).is_file()
    assert not (out / "samples" / "000.png").exists()
    assert main(sampling(run, out)) == 0
    assert not (out / UNFINISHED).exists()
    assert {file.name for file in (out / "samples").iterdir()} >= {"000.png", "prompts.json"}


@pytest.mark.parametrize("names", ['["/etc"]', '["../x"]', '["mine.txt"]', "{}", "[[]]", "x"])
def test_a_forged_marker_removes_nothing_of_a_user_s(tmp_path, names):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / UNFINISHED).write_text(names)
    with pytest.raises(OutputError, match="not an empty folder"):
        RunFolder.create(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_full_disk_leaves_no_marker(tmp_path):
    def fill():
        with unfinished(tmp_path, ["final"]):
            (tmp_path / "final").mkdir()
            raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left"):
        fill()
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_killed_before_its_settings_were_written(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / ".config.yaml.partial").write_text("half")
    RunFolder.create(tmp_path).write_text("config.yaml", "a: 1")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.yaml", "samples"]


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
