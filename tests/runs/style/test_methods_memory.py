"""The memory of runs by gradients beside that of forward passes alone, and its table."""

import re
from pathlib import Path

import pytest
import torch

from qzo_diffusion.cli import main
from qzo_diffusion.config.files import make_config
from qzo_diffusion.diffusion import memory
from qzo_diffusion.diffusion.pipeline_shape import known_shape
from qzo_diffusion.runs.style import memory as planning
from qzo_diffusion.runs.style import pipeline

MODELS = {"Large": "stabilityai/stable-diffusion-3.5-large"}
MODELS |= {"Medium": "stabilityai/stable-diffusion-3.5-medium"}
DOCUMENT = Path(__file__).parents[3] / "docs" / "models.md"
CARDS = (6, 8, 12, 16, 24)  # GB


def plan_of(model, side, method="qzo", **settings):
    """The plan of a GPU for twenty images, one at a time."""
    settings = {"train": {"micro_batch_size": 1}, "data": {"resolution": side}, **settings}
    config = make_config({"model": model, "method": method, **settings})
    shape = known_shape(model)
    place = pipeline.Runtime(Path(model), torch.device("cuda"), torch.bfloat16, shape)
    return planning.memory_plan(config, place, images=20, prompts=30)


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)


def train_of(plan):
    return next(phase for phase in plan.phases if phase.name == "train").parts


def rows():
    """The table of the document."""
    for name, model in MODELS.items():
        for side in (512, 1024):
            cells = []
            for one in plan_of(model, side).methods.values():
                card = next(card for card in CARDS if 0.95e9 * card >= one.whole)
                cells.append(f"{one.train / 1e9:.1f} GB")
                cells.append(f"{one.whole / 1e9:.1f} GB, a card of {card} GB")
            yield f"| SD3.5 {name}, {side} | {' | '.join(cells)} |"


def test_the_table_is_what_the_plan_says():
    text = DOCUMENT.read_text("utf-8")
    assert [row for row in rows() if row not in text] == []


def test_inputs_of_all_blocks_are_kept_and_the_rest_is_of_one_block():
    small, large = (
        train_of(plan_of(MODELS["Large"], side, "fo-scales", qzo={"parametrization": "separable"}))
        for side in (512, 1024)
    )
    assert small["inputs of blocks"] == 38 * (32**2 + 77 + 256) * 2432 * 2
    assert large["inputs of blocks"] == 38 * (64**2 + 77 + 256) * 2432 * 2
    of_passes = train_of(plan_of(MODELS["Large"], 512))
    assert small["one block"] > of_passes["forward"]
    assert small["gradient"] == small["trained numbers"] / 3  # θ and two moments of Adam


def test_every_scale_by_itself_has_a_gradient_of_its_size():
    dense = train_of(plan_of(MODELS["Large"], 512, "fo-scales"))
    rows = train_of(
        plan_of(MODELS["Large"], 512, "fo-scales", qzo={"parametrization": "separable"})
    )
    # two moments and the gradient of each of 125 million scales
    assert dense["gradient"] == dense["trained numbers"] / 2
    assert dense["gradient"] > 30 * rows["gradient"]


def test_a_dry_run_shows_both(train_arguments, capsys):
    assert main(train_arguments("--dry-run")) == 0
    text = capsys.readouterr().out
    (line,) = [line for line in text.splitlines() if line.strip().startswith("methods")]
    shown = re.findall(r"(\S+) (\d+\.\d+) \(steps (\d+\.\d+)\)", line)
    assert [name for name, *_ in shown] == ["qzo", "fo-scales"]
    assert all(0 < float(steps) <= float(whole) for _, whole, steps in shown)


def test_facts_for_scripts_have_both():
    facts = plan_of(MODELS["Large"], 512).facts()
    assert facts["methods_gb"]["fo-scales"] >= facts["methods_gb"]["qzo"] > 0


def test_steps_differ_where_another_phase_hides_it():
    passes, gradients = plan_of(MODELS["Large"], 512).methods.values()
    assert passes.whole == gradients.whole > gradients.train > passes.train


def test_codes_have_no_choice_of_method():
    config = make_config({"model": MODELS["Large"], "method": "quzo"})
    place = pipeline.Runtime(
        Path("large"), torch.device("cuda"), torch.bfloat16, known_shape(MODELS["Large"])
    )
    assert planning.memory_plan(config, place).methods == {}


if __name__ == "__main__":
    memory.available_bytes = lambda device: None
    print(*rows(), sep="\n")
