"""The wheel carries what a run needs, and runs where there is no clone."""

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image

CLONE = Path(__file__).parents[1]
IMAGES = {".jpeg", ".jpg", ".png", ".webp"}
HEAVY = ["torch", "torchvision", "numpy", "diffusers", "transformers", "bitsandbytes", "matplotlib"]


def run(*command, cwd):
    """Standard output of a command that sees neither the clone nor the caches in the home of who
    runs the tests.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "HOME": str(cwd)
    }
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        folder,
        CLONE,
        cwd=folder,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """bin/ of an environment with the wheel in it, which sees today's packages but not the
    clone.
    """
    root = tmp_path_factory.mktemp("installed")
    venv.create(root / "env", symlinks=True)
    binaries = root / "env" / "bin"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--python",
        binaries / "python",
    ]
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=root)
    (packages,) = (root / "env" / "lib").glob("python*/site-packages")
    # Lines added by a .pth are not searched for further .pth files, so an editable clone stays
    # unseen.
    (packages / "todays_packages.pth").write_text(
        "\n".join(p for p in sys.path if p.endswith("site-packages"))
    )
    return binaries


def files_under(folder):
    return {
        p.relative_to(CLONE).as_posix()
        for p in (CLONE / folder).rglob("*")
        if p.is_file() and p.suffix != ".pyc"
    }


def test_the_wheel_carries_everything(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    data = {
        f"qzo_diffusion/{name}" for folder in ("configs", "prompts") for name in files_under(folder)
    }
    assert (files_under("qzo_diffusion") | data) - names == set()
    outside = {
        name
        for name in names
        if not name.startswith("qzo_diffusion/") and ".dist-info/" not in name
    }
    assert outside == set()

    for what, found in {
        "the tiny model": {
            n
            for n in names
            if n.startswith("qzo_diffusion/models/tiny/") and n.endswith(".safetensors")
        },
        "its tokenizers": {n for n in names if n.startswith("qzo_diffusion/models/tiny/tokenizer")},
        "configs": {
            n for n in names if n.startswith("qzo_diffusion/configs/") and n.endswith(".yaml")
        },
        "prompts": {
            n for n in names if n.startswith("qzo_diffusion/prompts/") and n.endswith(".txt")
        },
        "demo images": {
            n
            for n in names
            if n.startswith("qzo_diffusion/demo_images/") and Path(n).suffix in IMAGES
        },
        "LICENSE": {n for n in names if n.endswith(".dist-info/licenses/LICENSE")},
        "NOTICE": {n for n in names if n.endswith(".dist-info/licenses/NOTICE")},
    }.items():
        assert found, f"the wheel lacks {what}"


def test_help_answers_without_importing_much(installed, tmp_path):
    """Torch alone brings a thousand modules, and seconds."""
    assert "train" in run(installed / "qzo-diffuse", "--help", cwd=tmp_path)
    script = f"""
import contextlib, io, sys
from qzo_diffusion.cli import main
sys.argv = ["qzo-diffuse", "--help"]
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    main()
print(len(sys.modules), sorted(set({HEAVY}) & set(sys.modules)), end=" ")
print(sys.modules["qzo_diffusion"].__file__)
"""
    count, heavy, file = run(installed / "python", "-c", script, cwd=tmp_path).split()
    assert heavy == "[]"
    assert int(count) < 250
    assert Path(file).is_relative_to(installed.parent)


def test_it_trains_outside_the_clone(installed, tmp_path):
    style = tmp_path / "style"
    style.mkdir()
    for name, colour in {
        "red": (200, 30, 30),
        "green": (30, 160, 60),
        "blue": (40, 60, 200),
    }.items():
        image = Image.new("RGB", (64, 64), "white")
        image.paste(colour, (12, 12, 52, 52))
        image.save(style / f"{name}.png")

    command = [
        "train",
        "--style-dir",
        style,
        "--model",
        "tiny",
        "--caption",
        "a square",
        "--max-steps",
        2,
        "data.batch_size=1",
        "sample.steps=2",
        "train.calibrate_lr=false",
    ]
    run(installed / "qzo-diffuse", *command, "--output-dir", "out", cwd=tmp_path)

    out = tmp_path / "out"
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "journal.qzo", "dataset.json"):
        assert (out / name).stat().st_size > 0, name
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert len([line for line in lines if "loss_plus" in line]) == 2
    assert list((out / "final").glob("*.safetensors"))
    dataset = (out / "dataset.json").read_text("utf-8")
    assert all(f"{name}.png" in dataset for name in ("red", "green", "blue"))
