"""Exports, as other programs read them: plain diffusers and bitsandbytes, never our own loader."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from qzo_diffusion.cli import main
from qzo_diffusion.config.files import make_config, read_yaml
from qzo_diffusion.core.errors import OutputError
from qzo_diffusion.core.merge import merge_changes_
from qzo_diffusion.quant.load import handles_of
from qzo_diffusion.runs.style import export as export_run
from qzo_diffusion.runs.style import pipeline
from qzo_diffusion.runs.tuned import load_scales
from tests.conftest import FAST, failing
from tests.small_models import sd3_inputs

SPEC_KEYS = (
    "sai_model_spec",
    "architecture",
    "implementation",
    "title",
    "date",
    "resolution",
    "license",
)


def test_cards_of_4_bit_folders_say_that_diffusers_needs_a_gpu():
    needing = {kind for kind, text in export_run.USE.items() if "No GPU found" in text}
    assert needing == {"nf4", "native"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    """A short run of dense numbers on the embedded model, which every format is made from."""
    from PIL import Image

    root = tmp_path_factory.mktemp("finished")
    (root / "imgs").mkdir()
    for index in range(4):
        Image.new("RGB", (64, 64), (60 * index, 0, 255 - 60 * index)).save(
            root / "imgs" / f"{index}.png"
        )
    (root / "prompts.txt").write_text("red apple\n")
    command = [
        "train",
        "--model",
        "tiny",
        "--style-dir",
        str(root / "imgs"),
        "--caption",
        "a square",
        "--max-steps",
        "2",
    ]
    command += [
        "--sample-prompts",
        str(root / "prompts.txt"),
        "--output-dir",
        str(root / "run"),
        f"data.cache_dir={cache}",
        *FAST,
    ]
    assert main([*command, "qzo.parametrization=dense", "train.lr=0.05"]) == 0
    return root / "run"


@pytest.fixture
def export(finished, tmp_path):
    def call(kind, *more, run=finished, name="out"):
        assert (
            main(
                [
                    "export",
                    "--run",
                    str(run),
                    "--format",
                    kind,
                    "--output-dir",
                    str(tmp_path / name),
                    *more,
                ]
            )
            == 0
        )
        return tmp_path / name

    return call


def tuned_model(run):
    """The codes of the base, and the model with the run's scales, on the CPU wherever the run
    was.
    """
    config = make_config(
        {**read_yaml(run / "config.yaml"), "compute": {"device": "cpu", "dtype": "float32"}}
    )
    base, scales, _ = pipeline.load_base(config, pipeline.find_runtime(config))
    codes = {handle.name: handle.codes.clone() for handle in handles_of(base)}
    merge_changes_(scales, [(load_scales(run)[0], 1.0)])
    return base, codes


def without_gpu_check(monkeypatch):
    """Diffusers refuses 4-bit models on a machine without a GPU, although bitsandbytes runs
    there.
    """
    from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer

    monkeypatch.setattr(
        BnB4BitDiffusersQuantizer, "validate_environment", lambda self, *args, **options: None
    )


@pytest.mark.parametrize("kind", ["nf4", "native"])
def test_nf4_loads_in_plain_diffusers_with_the_codes_of_the_base(
    export, finished, monkeypatch, kind
):
    from diffusers import SD3Transformer2DModel

    folder = export(kind)
    without_gpu_check(monkeypatch)
    loaded = SD3Transformer2DModel.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    tuned, codes = tuned_model(finished)
    assert len(codes) == sum(type(module).__name__ == "Linear4bit" for module in loaded.modules())
    for name, packed in codes.items():
        assert torch.equal(loaded.get_submodule(name).weight.data.view(-1), packed.view(-1)), name
        # or it rounds its scales to bfloat16
        loaded.get_submodule(name).support_avx512bf16_for_cpu = False
    x = sd3_inputs(tuned)
    with torch.no_grad():
        assert torch.equal(loaded(**x).sample, tuned(**x).sample)
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert settings["bnb_4bit_use_double_quant"] is False
    assert "proj_out" in settings["llm_int8_skip_modules"]


def test_bf16_gives_every_tensor_back_in_both_layouts(export, finished, tmp_path):
    from diffusers import SD3Transformer2DModel

    folder = export("bf16")
    tuned, _ = tuned_model(finished)
    shutil.copytree(
        folder, tmp_path / "only_config", ignore=shutil.ignore_patterns("*.safetensors")
    )
    single = str(folder / "original_layout.safetensors")
    models = [
        SD3Transformer2DModel.from_pretrained(folder, dtype=torch.bfloat16),
        SD3Transformer2DModel.from_single_file(
            single, config=str(tmp_path / "only_config"), dtype=torch.bfloat16
        ),
    ]
    expected = {
        f"{handle.name}.weight": handle.dequantized().bfloat16() for handle in handles_of(tuned)
    }
    expected |= {
        n: t.bfloat16()
        for n, t in tuned.state_dict().items()
        if t.is_floating_point() and ".weight." not in n
    }
    for model in models:
        state = model.state_dict()
        assert state.keys() == expected.keys()
        assert [name for name in state if not torch.equal(state[name], expected[name])] == []
    x = sd3_inputs(tuned)
    with torch.no_grad():
        wanted, got = tuned(**x).sample, models[1].float()(**x).sample
    # Each weight is off by up to 2^-9 of itself; their errors add up like noise, over 4 blocks not
    # beyond some percent.
    assert (got - wanted).norm() / wanted.norm() < 0.05


@pytest.mark.parametrize("kind", ["nf4", "bf16"])
def test_files_say_what_they_are(export, kind):
    folder = export(kind)
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            facts = handle.metadata()
        assert {f"modelspec.{key}" for key in SPEC_KEYS} <= facts.keys()
        assert facts["qzo.codes"]
        assert facts["qzo.model"] == "tiny"
        assert facts["qzo.steps"] == "2"
    text = (folder / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert "base_model" not in head  # the embedded model is on no hub
    assert head["license"] == "apache-2.0"
    for word in ("## Use", "## Scores", "## Settings", "samples.png", "dense"):
        assert word in text
    assert (folder / "samples.png").is_file()


def sampled(tmp_path, run, name, *more):
    prompts = tmp_path / "p.txt"
    prompts.write_text("banana\n")
    command = [
        "sample",
        "--run",
        str(run),
        "--prompts",
        str(prompts),
        "--output-dir",
        str(tmp_path / name),
        *more,
    ]
    assert main(command) == 0
    return (tmp_path / name / "samples" / "000.png").read_bytes()


@pytest.fixture(scope="module")
def coarse(tmp_path_factory, cache):
    """A run with other settings than the defaults, and a checkpoint of each of its two steps."""
    from PIL import Image

    root = tmp_path_factory.mktemp("coarse")
    for place in ("imgs", "held_out"):
        (root / place).mkdir()
        for index in range(4):
            Image.new("RGB", (64, 64), (60 * index, 0, 255 - 60 * index)).save(
                root / place / f"{index}.png"
            )
    (root / "prompts.txt").write_text("red apple in [trigger] style\n")
    command = [
        "train",
        "--model",
        "tiny",
        "--style-dir",
        str(root / "imgs"),
        "--caption",
        "a square",
        "--max-steps",
        "2",
    ]
    command += [
        "--validation-dir",
        str(root / "held_out"),
        "--trigger",
        "zxq",
        "--output-dir",
        str(root / "run"),
    ]
    command += [
        "--sample-prompts",
        str(root / "prompts.txt"),
        f"data.cache_dir={cache}",
        *FAST,
        "train.checkpoint_every=1",
    ]
    assert main([*command, "quant.blocksize=128", "data.resolution=96", "train.lr=0.05"]) == 0
    return root / "run"


@pytest.mark.parametrize("part", ["checkpoints/step_000002", "final", "final/scales.safetensors"])
def test_whatever_part_of_a_run_is_sampled_has_its_settings(coarse, tmp_path, capsys, part):
    prompts = tmp_path / "p.txt"
    prompts.write_text("red apple in [trigger] style\n")
    for name, run in (("whole", coarse), ("part", coarse / part)):
        assert (
            main(
                [
                    "sample",
                    "--run",
                    str(run),
                    "--prompts",
                    str(prompts),
                    "--output-dir",
                    str(tmp_path / name),
                ]
            )
            == 0
        )
    whole, own = (
        (tmp_path / name / "samples" / "000.png").read_bytes() for name in ("whole", "part")
    )
    assert whole == own
    assert (
        json.loads((tmp_path / "part/samples/prompts.json").read_text())[0]["prompt"]
        == "red apple in zxq style"
    )
    assert "model: tiny" in capsys.readouterr().err


def test_scales_alone_are_sampled_with_the_defaults_and_that_is_told(finished, tmp_path, capsys):
    alone = shutil.copy(finished / "final" / "scales.safetensors", tmp_path)
    sampled(tmp_path, alone, "out", "--model", "tiny")
    assert "no config.yaml" in capsys.readouterr().err


def test_a_failed_sample_leaves_nothing_and_what_is_there_is_found_at_once(
    coarse, tmp_path, capsys, monkeypatch
):
    from qzo_diffusion.runs.style import sample as sample_run

    command = [
        "sample",
        "--run",
        str(coarse),
        "--model",
        "tiny",
        "--output-dir",
        str(tmp_path / "out"),
    ]

    def broken(*args):
        raise OutputError("got", "expected", "remedy")

    with monkeypatch.context() as patched:
        patched.setattr(sample_run.pipeline, "load_base", broken)
        failing(capsys, main(command))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.png").touch()
    monkeypatch.setattr(sample_run, "load_tuned", None)
    error = failing(capsys, main(command))
    assert "not an empty folder" in error
    assert "--resume" not in error


@pytest.mark.parametrize("strength", ["0.5", "-1"])
def test_a_strength_needs_a_run(tmp_path, capsys, strength):
    command = [
        "sample",
        "--model",
        "tiny",
        "--strength",
        strength,
        "--output-dir",
        str(tmp_path / "out"),
    ]
    assert "without --run" in failing(capsys, main(command))


def scores_in(folder):
    return (folder / "README.md").read_text().split("## Scores")[1].split("## Settings")[0]


@pytest.mark.parametrize(
    ("kind", "part"), [("delta", ""), ("delta", "checkpoints/step_000001"), ("journal", "")]
)
def test_only_scores_of_the_exported_scales_are_told(coarse, tmp_path, export, kind, part):
    run, step = shutil.copytree(coarse, tmp_path / "run"), 1 if part else 2
    assert "held-out loss" in scores_in(export(kind, run=run, name="losses")) or part
    (run / "evaluation.json").write_text(
        json.dumps({"step": 3 - step, "clip_score": {"mean": "of other scales"}})
    )
    assert "other scales" not in scores_in(export(kind, run=run / part, name="other"))
    (run / f"evaluation_step_{step:06d}.json").write_text(
        json.dumps({"step": step, "clip_score": {"mean": "of these"}})
    )
    assert "of these" in scores_in(export(kind, run=run / part, name="own"))


@pytest.mark.parametrize("where", [".", "../here"])
def test_the_current_folder_is_not_replaced(finished, tmp_path, capsys, monkeypatch, where):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(export_run.pipeline, "load_base", None)
    command = ["export", "--run", str(finished), "--format", "delta", "--output-dir", where]
    assert "is the current folder" in failing(capsys, main(command))
    assert [file.name for file in tmp_path.iterdir()] == ["here"]


def test_a_delta_that_a_hub_added_to_is_used(export, tmp_path):
    delta = export("delta")
    (delta / ".gitattributes").write_text("*.safetensors filter=lfs")
    sampled(tmp_path, delta, "sampled")


def test_a_delta_samples_like_its_run(export, finished, tmp_path):
    pictures = [
        sampled(tmp_path, run, name, "--strength", "0.5")
        for name, run in (("a", finished), ("b", export("delta")))
    ]
    assert pictures[0] == pictures[1]


def test_a_delta_can_be_exported_and_mixed_again(export, tmp_path):
    delta = export("delta")
    again = export("delta", run=delta, name="again")
    first, second = load_scales(delta)[0], load_scales(again)[0]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert main(["mix", "--run", f"{delta}=1", "--output-dir", str(tmp_path / "mix")]) == 0


def test_a_journal_is_replayed_to_the_same_scales(export, finished, tmp_path):
    folder = export("journal")
    assert (
        main(
            [
                "replay",
                "--journal",
                str(folder / "journal.qzo"),
                "--output-dir",
                str(tmp_path / "replayed"),
            ]
        )
        == 0
    )
    tuned, replayed = load_scales(finished)[0], load_scales(tmp_path / "replayed")[0]
    assert all(torch.equal(tuned[name], replayed[name]) for name in tuned)


def test_json_says_what_was_written(export, capsys):
    folder = export("delta", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["format"] == "delta"
    assert facts["files"] == sorted(path.name for path in folder.iterdir())


def arguments(finished, tmp_path, kind="nf4"):
    return [
        "export",
        "--run",
        str(finished),
        "--format",
        kind,
        "--output-dir",
        str(tmp_path / "out"),
    ]


def test_nothing_is_overwritten(finished, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    assert "not an empty folder" in failing(capsys, main(arguments(finished, tmp_path)))
    assert (tmp_path / "out" / "file").read_text() == "mine"


def test_too_little_room_is_told_before_anything_is_written(
    finished, tmp_path, capsys, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        "qzo_diffusion.system.files.shutil.disk_usage", lambda path: usage._replace(free=1000)
    )
    assert "GB free for an export" in failing(capsys, main(arguments(finished, tmp_path)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["nf4", "bf16", "delta"])
def test_what_does_not_read_back_is_no_export(finished, tmp_path, capsys, monkeypatch, kind):
    plain = export_run.write_tensors

    def flipped(file, *args):
        plain(file, *args)
        data = bytearray(file.read_bytes())
        data[-9] ^= 1
        file.write_bytes(data)

    monkeypatch.setattr(export_run, "write_tensors", flipped)
    failing(capsys, main(arguments(finished, tmp_path, kind)))
    assert not (tmp_path / "out").exists()


def test_an_interrupted_export_leaves_no_export_and_the_next_one_works(
    export, finished, tmp_path, monkeypatch
):
    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(export_run, "compare_tensors", interrupted)
        assert main(arguments(finished, tmp_path, "delta")) == 130
    assert not (tmp_path / "out").exists()
    assert (export("delta") / "COMPLETE").is_file()


KILLED = """
import sys
from qzo_diffusion.runs.style import export
from qzo_diffusion.cli import main
from tests.killed_writing import kill_while_writing
kill_while_writing(export, int(sys.argv[1]))
main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("left", [0, 40])
def test_an_export_that_is_killed_leaves_nothing_that_is_used(export, finished, tmp_path, left):
    command = [sys.executable, "-c", KILLED, left, *arguments(finished, tmp_path, "nf4")]
    done = subprocess.run(
        [*map(str, command)], cwd=Path(__file__).parents[2], capture_output=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists()
    assert (export("nf4") / "COMPLETE").is_file()


def test_formats_that_do_not_fit_the_run_are_refused(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "fp4")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["quant"]["type"] = "fp4"
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    assert "a run in fp4" in failing(capsys, main(arguments(run, tmp_path)))
    (run / "config.yaml").unlink()
    assert "no config.yaml" in failing(capsys, main(arguments(run, tmp_path)))


@pytest.fixture
def told(finished, tmp_path, monkeypatch):
    """A copy of the run whose settings, metadata and journal name places, a user and a machine."""
    from qzo_diffusion.core.journal import encoded, read_journal
    from qzo_diffusion.runs import publish
    from qzo_diffusion.system.files import SCALES, write_folder
    from qzo_diffusion.train.run_folder import save_tensors

    monkeypatch.setenv("LOGNAME", "annalena")
    monkeypatch.setattr(publish.socket, "gethostname", lambda: "workhorse")
    run = shutil.copytree(finished, tmp_path / "# <b>annalena<br>\n[ink](x) on workhorse")
    settings = (run / "config.yaml").read_text()
    settings = settings.replace("cache_dir: ", "cache_dir: /srv/annalena/")
    settings = settings.replace("prompts: ", "prompts: /srv/annalena/")
    (run / "config.yaml").write_text(settings)
    tensors, facts = load_scales(run)
    facts["qzo.model"], facts["qzo.mix"] = "/srv/annalena/tiny", "/srv/annalena/a=1 /srv/b=0.5"
    write_folder(run / "final", lambda folder: save_tensors(folder / SCALES, tensors, facts))
    journal = read_journal(run / "journal.qzo")
    header = {**journal.header, "init_from": "/srv/annalena/before"}
    (run / "journal.qzo").write_bytes(encoded(header, journal.entries))
    environment = json.loads((run / "environment.json").read_text())
    environment |= {"node": "workhorse", "model": "/srv/annalena/tiny"}
    (run / "environment.json").write_text(json.dumps(environment))
    return run


@pytest.mark.parametrize("kind", ["bf16", "delta", "journal"])
def test_what_is_published_names_no_place_user_or_machine(told, export, kind):
    folder = export(kind, run=told)
    assert main(["report", "--run", str(told)]) == 0
    files = [path for path in folder.iterdir() if path.is_file()] + [told / "report.html"]
    assert len(files) > 3
    for file in files:
        data = file.read_bytes()
        for secret in (b"annalena", b"workhorse", b"/srv", str(told.parent).encode()):
            assert secret not in data, (file.name, secret)


def test_a_card_escapes_names_and_shows_tables(told, export):
    import markdown_it

    text = (export("delta", run=told) / "README.md").read_text()
    assert "{" not in text
    parser = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table")
    page = parser.render(text.split("---\n", 2)[2])
    assert page.count("<h1>") == 1
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert 'href="x"' not in page
    assert page.count("<table>") == 1  # nothing was measured


def test_a_card_shows_the_verdict_and_the_figures_of_an_evaluation(finished, tmp_path, export):
    from tests.evaluate.test_report_in_browser import evaluation

    run = shutil.copytree(finished, tmp_path / "scored")
    (run / "evaluation.json").write_text(json.dumps(evaluation() | {"step": 2}))
    text = (export("delta", run=run) / "README.md").read_text()
    assert "The style came" in text
    assert "| Similarity to the style | 0.3000 | 0.5000 | +0.2000 | +0.1500 to +0.2500 |" in text
    assert "CLIP score" not in text
