"""No local path, user or machine in what other people read."""

import json
from pathlib import Path

import pytest

from qzo_diffusion.runs import publish
from qzo_diffusion.runs.publish import base_id, published, published_text

HOME, USER, HOST = "/home/annalena", "annalena", "workhorse"


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    monkeypatch.setenv("HOME", HOME)
    monkeypatch.setenv("LOGNAME", USER)
    monkeypatch.setattr(publish.socket, "gethostname", lambda: f"{HOST}.lab.example")


SETTINGS = {
    "model": f"{HOME}/models/sd35",
    "init_from": "/mnt/runs/ink/checkpoints/step_000100",
    "data": {
        "style_dir": f"{HOME}/my pictures/ink wash",
        "validation_dir": "../held out",
        "cache_dir": f"\\\\{HOST}\\share\\cache",
        "caption": "a cat / a dog, 24/7",
        "resolution": 512,
        "trigger": None,
    },
    "sample": {"prompts": "~/prompts.txt", "negative_prompt": f"a photo by {USER}"},
    "note": [f"{USER}@{HOST}", Path(HOME) / "x.png", "C:\\Users\\annalena\\a.png"],
    "train": {"lr": 0.1, "schedule": "constant"},
    "qzo.mix": f"{HOME}/ink=0.5 /mnt/b/c=-1",
}


def test_settings_lose_places_and_names():
    found = published(SETTINGS)
    text = json.dumps(found["data"] | {key: found[key] for key in ("model", "note", "qzo.mix")})
    for secret in (HOME, USER, HOST, "/mnt", "share", "Users", ".."):
        assert secret not in text
    assert found["model"] == "sd35"
    assert found["init_from"] == "step_000100"
    assert found["data"]["style_dir"] == "ink wash"
    assert found["data"]["validation_dir"] == "held out"
    assert found["data"]["caption"] == SETTINGS["data"]["caption"]
    assert found["data"]["resolution"] == 512
    assert found["data"]["cache_dir"] is None
    assert found["data"]["trigger"] is None
    assert found["sample"]["prompts"] == "prompts.txt"
    assert found["note"][1:] == ["x.png", "a.png"]
    assert found["train"] == SETTINGS["train"]
    assert found["qzo.mix"] == "ink=0.5 c=-1"
    assert published(found) == found


def test_words_that_are_no_places_stay():
    for text in (
        "cosine",
        "nf4",
        "a/b",
        "0.1, constant",
        "https://example.com/a",
        "and/or",
        "1 / 2",
    ):
        assert published(text) == text
    assert published_text(f"kept in {HOME}/a (see /etc/x)") == "kept in a (see x)"


def test_ordinary_names_of_users_are_no_secret(monkeypatch):
    monkeypatch.setenv("HOME", "/root")
    monkeypatch.setenv("LOGNAME", "root")
    monkeypatch.setattr(publish.socket, "gethostname", lambda: "tiny")
    found = published({"model": "tiny", "caption": "root", "note": "root of tiny"})
    assert found == {"model": "tiny", "caption": "root", "note": "root of tiny"}
    assert published("/root/a") == "a"
    assert publish.published_facts({"qzo.model": "/srv/models--a--b/x"}) == {"qzo.model": "a/b"}


def test_without_a_home_nothing_fails(monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(publish.Path, "home", nowhere)
    assert published({"model": f"{HOME}/a"}) == {"model": "a"}


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ("stabilityai/stable-diffusion-3.5-large", "stabilityai/stable-diffusion-3.5-large"),
        (
            "/c/hub/models--stabilityai--stable-diffusion-3.5-medium/snapshots/0a1b",
            "stabilityai/stable-diffusion-3.5-medium",
        ),
        ("tiny", None),
        ("auto", None),
        ("/models/sd35", None),
        ("sd35.safetensors", None),
        ("~/models/sd35", None),
        ("a/b/c", None),
    ],
)
def test_only_a_real_id_names_the_base(model, found):
    assert base_id(model) == found


def test_a_folder_that_looks_like_an_id_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "sd35").mkdir(parents=True)
    assert base_id("models/sd35") is None
    assert published({"model": "models/sd35"}) == {"model": "sd35"}
