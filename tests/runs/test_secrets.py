"""Tokens, proxies and the home folder stay out of what a run says; nothing is world-writable."""

import os
import stat

import pytest
import torch

from qzo_diffusion.cli import main
from qzo_diffusion.runs.provenance import environment
from qzo_diffusion.runs.publish import published, published_text, without_secrets

TOKEN = "hf_" + "aB3" * 10


@pytest.fixture
def secrets(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "anneliese"))
    monkeypatch.setenv("HF_TOKEN", "very-secret-token")
    monkeypatch.setenv("https_proxy", "http://anne:geheim@proxy.example:3128")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")


@pytest.mark.parametrize(
    "text",
    [
        "model very-secret-token/x",
        "through http://anne:geheim@proxy.example:3128 to",
        "https://anne:geheim@example.org/model",
        "ftp://anne@example.org",
        f"downloaded with {TOKEN}",
        "key=0123456789abcdef",
    ],
)
def test_secrets_are_taken_out(secrets, text):
    for shown in (
        without_secrets(text),
        published_text(text),
        published({"caption": text})["caption"],
        published({"other": text})["other"],
    ):
        for secret in ("very-secret", "geheim", "anne@", TOKEN, "0123456789"):
            assert secret not in shown


def test_a_text_without_secrets_stays_as_it_is(secrets):
    for text in ("https://example.org/a:b@c", "me@example.org", "hf_short", "a no proxy b"):
        assert without_secrets(text) == text


def test_the_environment_of_a_run_names_no_home(secrets, tmp_path):
    home = tmp_path / "anneliese"
    model = home / "models" / "mine"
    model.mkdir(parents=True)
    facts = environment(str(model), torch.device("cpu"), torch.float32)
    assert facts["model"] == "mine"
    assert not any(word in str(facts) for word in ("anneliese", "secret", "geheim", "0123456789"))


def test_errors_name_no_secret(secrets, capsys, tmp_path):
    assert main(["validate", "--config", str(tmp_path / "very-secret-token.yaml")]) == 2
    assert "very-secret" not in capsys.readouterr().err


def test_nothing_that_a_verb_writes_is_world_writable(tmp_path, monkeypatch):
    before = os.umask(0)
    try:
        monkeypatch.chdir(tmp_path)
        assert main(["validate", "--config", "demo.yaml"]) == 0
        (tmp_path / "folder").mkdir()
        (tmp_path / "file").touch()
    finally:
        os.umask(before)
    for name in ("folder", "file"):
        assert not (tmp_path / name).stat().st_mode & stat.S_IWOTH
