"""Small random pipelines of every family and runs of them, made once."""

import pytest

from benchmarks.families import runs, small

FEW = ("train.micro_batch_size=8", "data.batch_size=2", "train.calibrate_lr=false")


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Return the folder of a family's small pipeline, by its name and the settings of a variant."""
    folders = {}

    def folder(name, settings):
        key = (name, *settings.values())
        if key not in folders:
            folders[key] = small.write(name, tmp_path_factory.mktemp(name), **settings)
        return folders[key]

    return folder


@pytest.fixture(scope="session")
def run_of(tmp_path_factory):
    """Return the model and a run of three steps of a family, made once."""
    found = {}

    def run(name):
        if name not in found:
            root = tmp_path_factory.mktemp(name)
            model = small.write(name, root / "model")
            found[name] = model, runs.train(model, root / "run", "--max-steps", "3", *FEW)
        return found[name]

    return run
