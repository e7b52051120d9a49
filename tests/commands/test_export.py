"""Exports, as other programs read them: plain diffusers and bitsandbytes, never our own loader."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors import safe_open

from qzo_diffusion.cli import main
from qzo_diffusion.config.files import make_config, read_yaml
from qzo_diffusion.core.merge import merge_changes_
from qzo_diffusion.quant.load import handles_of
from qzo_diffusion.runs.style import pipeline
from qzo_diffusion.runs.tuned import load_scales
from tests.commands.short_runs import export_arguments, sampled
from tests.conftest import failing
from tests.small_models import sd3_inputs

pytestmark = pytest.mark.usefixtures("small_tiny")

SPEC_KEYS = (
    "sai_model_spec",
    "architecture",
    "implementation",
    "title",
    "date",
    "resolution",
    "license",
)


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

    folder = export("bf16", "--layout", "both")
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


@pytest.mark.parametrize(
    ("layout", "files"),
    [
        ((), {"diffusion_pytorch_model.safetensors", "config.json"}),
        (("--layout", "diffusers"), {"diffusion_pytorch_model.safetensors", "config.json"}),
        (("--layout", "original"), {"original_layout.safetensors"}),
    ],
)
def test_bf16_writes_one_layout(export, layout, files):
    folder = export("bf16", *layout)
    there = {path.name for path in folder.iterdir()}
    assert there == files | {"COMPLETE", "README.md", "run.yaml", "samples.png"}
    text = (folder / "README.md").read_text()
    assert ("ComfyUI" in text) == ("original" in layout)


@pytest.mark.parametrize(
    "flags", [("nf4", "--layout", "both"), ("lora", "--layout", "both"), ("bf16", "--rank", "4")]
)
def test_a_flag_of_another_format_is_refused(finished, tmp_path, capsys, flags):
    kind, *more = flags
    command = [*export_arguments(finished, tmp_path / "out", kind), *more]
    assert f"{more[0]} with --format {kind}" in failing(capsys, main(command))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["nf4", "bf16", "lora"])
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
