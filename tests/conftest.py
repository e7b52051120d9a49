"""Every test runs offline, on few threads and from the same random state, whatever ran before
it.
"""

import os

# Read when the libraries are imported, so it has to stand above them. Threads that wait spin by
# default, which takes the processor from another test.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
)

import gc
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import pytest
from PIL import Image

from qzo_diffusion import resources

# torch is imported where tests run: the process that hands them out to others does without it.

# pytest-xdist hands out whole files in the order of their tests (--no-loadscope-reorder).
# These begin first: begun last, they would keep one process busy while the other has nothing left.
LONGEST = (
    "runs/test_ranks.py",
    "test_packaging.py",
    "test_network.py",
    "commands/test_evaluate_runs.py",
    "runs/test_resume.py",
    "commands/test_train.py",
    "runs/llm/test_methods.py",
    "runs/llm/test_formats.py",
    "commands/test_export.py",
    "runs/style/test_tuned_between.py",
    "runs/style/test_votes.py",
    "runs/style/test_prior.py",
    "commands/test_gguf_runs.py",
    "runs/test_limits.py",
    "runs/llm/test_transforms.py",
    "train/test_distributed.py",
    "test_streams.py",
)


def pytest_collection_modifyitems(items):
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


# On a busy machine examples take long to draw, which says nothing about the code.
hypothesis.settings.register_profile(
    "house",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("house")


@pytest.fixture(scope="session", autouse=True)
def _few_threads():
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def _global_random_state(request):
    """Building a layer draws from torch's global generator, which is fine; seeding it is not, ours
    or a library's.
    """
    import torch

    state, seed = torch.get_rng_state(), torch.initial_seed()
    yield
    seeded = torch.initial_seed() != seed
    torch.set_rng_state(state)
    if seeded and not request.node.get_closest_marker("global_rng"):
        pytest.fail(
            "torch's global random generator was seeded; pass a torch.Generator, or mark the "
            "test global_rng"
        )


@pytest.fixture
def global_rng_untouched():
    """For code that promises not even to draw from torch's global generator."""
    import torch

    state = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), state), (
        "torch's global random generator was drawn from or seeded"
    )


@pytest.fixture(scope="module", autouse=True)
def _quick_collections():
    """Models are freed by collections of garbage, which look at every object of every library that
    was imported; once frozen, those are left out.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def pages():
    """For tests of the page on a run; see `_no_pages`."""


@pytest.fixture(autouse=True)
def _no_pages(request, monkeypatch):
    """Runs write no page where no test reads it: on a small model it takes as long as a step."""
    trainer = sys.modules.get("qzo_diffusion.runs.trainer")  # or nothing here trains
    if trainer and "pages" not in request.fixturenames:
        monkeypatch.setattr(trainer, "report_run", SimpleNamespace(write=lambda folder: None))


# Whole runs of the command line: short ones, on a small random model, with two prompts. In
# bfloat16, a GPU's default, what tests call equal up to rounding is not. Rates are calibrated where
# tests ask for it.
FAST = [
    "sample.steps=2",
    "data.batch_size=4",
    "sample.every=0",
    "train.validate_every=0",
    "compute.dtype=float32",
    "train.calibrate_lr=false",
]


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """The folder of a whole model, far quicker than the embedded one; it has learnt nothing.

    Its parts are checked against each other once, not at the start of every run.
    """
    from qzo_diffusion.runs.style import pipeline as style_pipeline
    from tests.small_pipeline import write_pipeline

    folder = write_pipeline(tmp_path_factory.mktemp("pipeline"))
    check_shape, checked = style_pipeline.check_shape, []

    def check(shape, place):
        if place != folder:
            check_shape(shape, place)
        elif shape not in checked:
            check_shape(shape, place)
            checked.append(shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style_pipeline, "check_shape", check)
        yield folder


@pytest.fixture
def small_tiny(monkeypatch, pipeline):
    """The embedded model's name means the small random one, which is quicker."""
    monkeypatch.setattr(resources, "tiny_model", lambda: pipeline)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A cache of encoded images and prompts that all runs share."""
    return str(tmp_path_factory.mktemp("cache"))


def write_images(folder: Path) -> Path:
    """Six small drawings with captions."""
    folder.mkdir()
    for index in range(6):
        image = Image.new("RGB", (64, 64), (40 * index, 0, 255 - 40 * index))
        image.paste((255, 40 * index, 0), (4, 4 + 6 * index, 28, 24 + 6 * index))
        image.save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"square {index}")
    return folder


def write_squares(folder: Path, colours) -> Path:
    """A plain picture in each colour, without captions."""
    folder.mkdir(parents=True)
    for index, colour in enumerate(colours):
        Image.new("RGB", (64, 64), colour).save(folder / f"{index}.png")
    return folder


def write_prompts(folder: Path) -> Path:
    path = folder / "prompts.txt"
    path.write_text("red apple\nbanana\n")
    return path


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "imgs")


@pytest.fixture
def prompts(tmp_path):
    return write_prompts(tmp_path)


@pytest.fixture(scope="session")
def command_line(cache, pipeline):
    """Builds the command line of a run from its places and any further arguments."""

    def build(*arguments, style_dir, prompts, output_dir):
        model = [] if "--model" in arguments else ["--model", pipeline]
        places = ["--style-dir", style_dir, "--sample-prompts", prompts, "--output-dir", output_dir]
        settings = [f"data.cache_dir={cache}", *FAST]
        return [str(part) for part in ["train", *model, *places, *settings, *arguments]]

    return build


@pytest.fixture
def train_arguments(tmp_path, images, prompts, command_line):
    """The command line of a run on those drawings into `tmp_path/<name>`."""

    def build(*arguments, name="run", style_dir=images):
        places = {"style_dir": style_dir, "prompts": prompts, "output_dir": tmp_path / name}
        return command_line(*arguments, **places)

    return build


@pytest.fixture
def train(train_arguments):
    """Runs that command line in this process; returns the exit code."""
    from qzo_diffusion.cli import main

    return lambda *arguments, **places: main(train_arguments(*arguments, **places))


def killed_after(monkeypatch, step):
    """As by a kill, nothing of what comes after that many steps is done."""
    from qzo_diffusion.runs.trainer import Trainer

    original = Trainer.on_step

    def on_step(self, record):
        original(self, record)
        if record.step + 1 == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "on_step", on_step)


def metrics(run: Path, seconds: bool = False):
    """The lines of metrics.jsonl, without the one figure that no two runs share."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return (
        lines
        if seconds
        else [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    )


def failing(capsys, code):
    """What stderr must hold whenever a user can mend something."""
    error = capsys.readouterr().err
    assert code == 2, error
    assert "Traceback" not in error
    for word in ("got:", "expected:", "remedy:"):
        assert word in error
    return error
