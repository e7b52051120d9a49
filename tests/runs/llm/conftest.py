"""A tiny Llama, sentences for it, and the command line of a short run on them."""

import pytest

from tests.runs.llm.short_run import command_line
from tests.tiny_llama import save_tiny_llama, write_sentences


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_sentences(tmp_path_factory.mktemp("sentences"))


@pytest.fixture
def arguments(tmp_path, model, data):
    """The command line of a short run into `tmp_path/<name>`."""
    return lambda *more, name="run": command_line(tmp_path / name, model, data, *more)
