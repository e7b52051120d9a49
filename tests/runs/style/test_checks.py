"""Images and texts that the model can't take are told when the plan is made."""

import json
import shutil

import pytest
from PIL import Image

from qzo_diffusion import resources
from qzo_diffusion.cli import main
from qzo_diffusion.config.style import Config
from tests.conftest import failing


@pytest.fixture(scope="module")
def added(tmp_path_factory):
    """The embedded model, with a token in each CLIP tokenizer that no encoder was resized for."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("model") / "pipeline"
    folder.mkdir()
    for part in resources.tiny_model().iterdir():
        if part.name.startswith("tokenizer") and part.name != "tokenizer_3":
            shutil.copytree(part, folder / part.name)
            tokenizer = AutoTokenizer.from_pretrained(part)
            tokenizer.add_tokens(["<style1>"])
            tokenizer.save_pretrained(folder / part.name)
        else:
            (folder / part.name).symlink_to(part)
    return folder


def dry_run(train, *arguments):
    return train("--dry-run", *arguments)


def test_a_square_beyond_the_positions(train, capsys):
    error = failing(capsys, dry_run(train, "data.resolution=512"))
    assert "512x512 pixels" in error
    assert "at most 128 pixels" in error
    assert "data.resolution=" in error


def test_one_wide_picture_beyond_the_positions(train, images, capsys):
    Image.new("RGB", (900, 300)).save(images / "wide.png")
    error = failing(capsys, dry_run(train, "data.resolution=128"))
    assert "for wide.png (1 of 8 are too large)" in error


def test_the_advised_resolution_fits(train, images, capsys):
    Image.new("RGB", (900, 300)).save(images / "wide.png")
    error = failing(capsys, dry_run(train, "data.resolution=128"))
    advised = error.rpartition("data.resolution=")[2].split()[0]
    assert dry_run(train, f"data.resolution={advised}") == 0


def test_samples_beyond_the_positions(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("qzo_diffusion.runs.style.pipeline.load_base", None)  # never reached
    settings = Config(model="tiny", data={"resolution": 1024})
    monkeypatch.setattr("qzo_diffusion.runs.style.sample._config_of", lambda request: settings)
    code = main(["sample", "--prompt", "a cat", "--output-dir", str(tmp_path / "s")])
    assert "1024x1024 pixels for samples" in failing(capsys, code)


@pytest.mark.parametrize("place", ["caption", "metadata", "prompts", "negative", "option"])
def test_a_token_without_an_embedding(train, images, prompts, added, capsys, place):
    arguments = [f"--model={added}"]
    expected = {
        "caption": "2.txt: token '<style1>' has the id",
        "metadata": "metadata.jsonl, line 2: token",
        "prompts": "prompts.txt, line 2: token",
        "negative": "prompts.txt, line 2: token",
        "option": "sample.negative_prompt: token",
    }[place]
    if place == "caption":
        (images / "2.txt").write_text("a <style1> square")
    elif place == "metadata":
        rows = [{"file_name": f"{at}.png", "text": "x <style1>" * at} for at in (0, 1)]
        (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    elif place == "option":
        arguments.append("sample.negative_prompt=ugly <style1>")
    else:
        text = "pear <style1>" if place == "prompts" else "pear --n <style1>"
        prompts.write_text(f"red apple\n{text}\n")
    error = failing(capsys, dry_run(train, *arguments))
    assert expected in error
    assert "text_encoder has no embedding" in error


def test_half_a_pair_in_a_caption_of_the_command_line(train, images, capsys):
    for path in images.glob("*.txt"):
        path.unlink()
    error = failing(capsys, dry_run(train, "--caption", "a \udce9 square"))
    assert "surrogate" in error or "UTF-8" in error
