"""Short runs that verbs read: how they are made, and what they left."""

import json

from qzo_diffusion.cli import main
from tests.conftest import write_squares


def train_no_step(folder, command_line, model):
    """Tuned is base, so every difference must be nothing."""
    for name, count in (("train", 5), ("held_out", 3)):
        write_squares(folder / name, [(40 * count, 40 * index, 0) for index in range(count)])
    (folder / "prompts.txt").write_text("red apple\nbanana\n")
    more = ["--validation-dir", folder / "held_out", "--caption", "leaf", "--max-steps", 0]
    places = {"style_dir": folder / "train", "prompts": folder / "prompts.txt"}
    run = folder / "run"
    assert main(command_line("--model", model, *more, **places, output_dir=run)) == 0
    return run


def sampled(tmp_path, run, name, *more, prompt="banana"):
    """The first picture of `sample --run`, as its file."""
    prompts = tmp_path / "p.txt"
    prompts.write_text(f"{prompt}\n")
    places = ["--run", run, "--prompts", prompts, "--output-dir", tmp_path / name]
    assert main(["sample", *map(str, places), *more]) == 0
    return (tmp_path / name / "samples" / "000.png").read_bytes()


def export_arguments(run, output_dir, kind="nf4"):
    return ["export", "--run", str(run), "--format", kind, "--output-dir", str(output_dir)]


def scored(run):
    return json.loads((run / "evaluation.json").read_text())


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
