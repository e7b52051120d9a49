"""Paths: `~`, whole paths in config.yaml, and where caches are without a home."""

import os
import stat

import pytest
import yaml

from qzo_diffusion import resources
from qzo_diffusion.config.files import changed_settings, make_config, with_whole_paths
from qzo_diffusion.config.llm import LlmConfig
from qzo_diffusion.config.reward import RewardName
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.errors import ConfigError

STYLE_PATHS = {
    "model": "~/m",
    "transformer": "~/t.safetensors",
    "init_from": "~/r",
    "data": {"style_dir": "~/i", "validation_dir": "~/v", "cache_dir": "~/c"},
    "sample": {"prompts": "~/p.txt"},
}
TEXT_PATHS = {
    "model": "~/m",
    "task": "~/t.yaml",
    "data": {"dir": "~/d", "train_file": "~/a.tsv", "test_file": "~/b.tsv"},
}


@pytest.mark.parametrize(("settings", "kind"), [(STYLE_PATHS, Config), (TEXT_PATHS, LlmConfig)])
def test_a_home_is_written_out_in_every_path(settings, kind, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    written = yaml.safe_dump(settings).replace("~/", "/somewhere/")
    assert make_config(settings, kind) == make_config(yaml.safe_load(written), kind)


def test_no_other_text_loses_its_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    config = make_config({"data": {"caption": "~", "trigger": "~/x"}, "model": "./~/m"})
    assert (config.data.caption, config.data.trigger, config.model) == ("~", "~/x", "./~/m")


@pytest.mark.parametrize("text", ["", " ", "a\0b"])
def test_a_path_that_can_be_none_is_refused(text):
    for settings in ({"model": text}, {"data": {"cache_dir": text}}):
        with pytest.raises(ConfigError, match="a path"):
            make_config(settings)


def test_paths_are_stored_whole_and_names_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("m", "tiny", "imgs", "link"):
        (tmp_path / name).mkdir() if name != "link" else (tmp_path / name).symlink_to("imgs")
    given = {
        "model": "m",
        "transformer": "t.gguf",
        "init_from": "link/../m",
        "data": {"style_dir": "link", "validation_dir": "imgs/.", "cache_dir": "c"},
        "sample": {"prompts": "grid.txt"},
    }
    found = with_whole_paths(make_config(given))
    assert (found.model, found.transformer) == (str(tmp_path / "m"), str(tmp_path / "t.gguf"))
    assert found.init_from == str(tmp_path / "m")
    assert found.data.style_dir == str(tmp_path / "link")  # a link's name may have its own ending
    assert (found.data.validation_dir, found.data.cache_dir) == (
        str(tmp_path / "imgs"),
        str(tmp_path / "c"),
    )
    assert found.sample.prompts == "grid.txt"  # of the shipped ones; there is no such file here
    for name in ("tiny", "auto", "stabilityai/stable-diffusion-3.5-large"):
        assert with_whole_paths(make_config({"model": name})).model == name
    assert with_whole_paths(make_config({"task": "m", "data": {"train_file": "m"}}, LlmConfig)) == (
        make_config({"task": "m", "data": {"train_file": "m"}}, LlmConfig)
    )


def test_a_path_that_was_stored_as_it_was_typed_is_no_change():
    def of(prompts):
        return make_config({"sample": {"prompts": prompts}})

    assert changed_settings(of("a/p.txt"), of("/job/a/p.txt")) == []
    for before, after in (("/a/p.txt", "/b/p.txt"), ("p.txt", "/a/q.txt"), ("p.txt", None)):
        assert len(changed_settings(of(before), of(after))) == 1
    before, after = (make_config({"data": {"caption": text}}) for text in ("x", "/x"))
    assert len(changed_settings(before, after)) == 1
    assert changed_settings(before, after, unless=["data.caption"]) == []


@pytest.fixture
def homeless(monkeypatch, tmp_path):
    """Neither a home nor an entry in the table of users; temporary folders in `tmp_path`."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_entry(uid):
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", no_entry)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def test_without_a_home_the_cache_is_a_folder_of_the_user_alone(homeless, tmp_path):
    folder = resources.cache_folder()
    assert folder.parent == tmp_path
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert resources.cache_folder() == folder


@pytest.mark.parametrize("spoil", ["link", "file", "open", "foreign"])
def test_a_folder_that_somebody_else_prepared_is_not_used(homeless, tmp_path, monkeypatch, spoil):
    place = tmp_path / f"qzo_diffusion-{os.getuid()}"
    if spoil == "link":
        (tmp_path / "theirs").mkdir()
        place.symlink_to(tmp_path / "theirs")
    elif spoil == "file":
        place.write_text("")
    else:
        place.mkdir()
        place.chmod(0o777 if spoil == "open" else 0o755)
    if spoil == "foreign":
        owner = os.getuid()
        monkeypatch.setattr("os.getuid", lambda: owner + 1)
        place.rename(tmp_path / f"qzo_diffusion-{owner + 1}")
    folder = resources.cache_folder()
    assert folder.parent == tmp_path
    assert folder.name not in (place.name, f"qzo_diffusion-{os.getuid()}", "theirs")


def test_a_path_with_a_tilde_needs_a_home(homeless):
    with pytest.raises(ConfigError, match="no home folder is known"):
        make_config({"data": {"style_dir": "~/imgs"}})


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert resources.cache_folder() == tmp_path / "xdg" / "qzo_diffusion"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert resources.cache_folder() == tmp_path / "home" / ".cache" / "qzo_diffusion"


def test_a_reward_without_an_argument_gets_no_path(tmp_path, monkeypatch):
    """The folder that the command is given in is no scorer."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip").mkdir()
    texts = [
        RewardName.parse(text).with_whole_path().text for text in ("clip_score", "clip_score:clip")
    ]
    assert texts == ["clip_score", f"clip_score:{tmp_path / 'clip'}"]
