"""Incomplete and foreign folders of every family are refused, with a way out, before any work."""

import json
import shutil

import pytest

from benchmarks.families import small
from qzo_diffusion.config.files import make_config
from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.diffusion.families import registry
from qzo_diffusion.runs.style.pipeline import check_model


def the_file(place):
    (file,) = place.glob("*.safetensors")
    return file


def lack_a_part(folder, part):
    shutil.rmtree(folder / part)


def have_the_fp16_variant_alone(folder, part):
    file = the_file(folder / part)
    file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))


def lack_a_shard(folder, part):
    file = the_file(folder / part)
    shards = {"one": f"{file.stem}-00001-of-00002.safetensors", "two": "lost.safetensors"}
    file.rename(file.with_name(shards["one"]))
    index = file.with_name(f"{file.name}.index.json")
    index.write_text(json.dumps({"weight_map": shards}))


def be_a_pickle(folder, part):
    the_file(folder / part).rename(folder / part / "diffusion_pytorch_model.bin")


CASES = {
    lack_a_part: "lacks the part",
    have_the_fp16_variant_alone: "fp16 variant alone",
    lack_a_shard: "lacks the file lost.safetensors",
    be_a_pickle: "pickles only",
}


@pytest.mark.parametrize("name", small.NAMES)
def test_an_intact_folder_is_taken(made, name):
    folder = made(name, {})
    check_model(make_config({"model": str(folder)}), folder)


@pytest.mark.parametrize("name", small.NAMES)
@pytest.mark.parametrize("damage", CASES)
def test_a_folder_that_cannot_be_used_is_refused(made, tmp_path, name, damage):
    folder = shutil.copytree(made(name, {}), tmp_path / "model")
    config = make_config({"model": str(folder)})
    damage(folder, registry.by_name(name).denoiser.part)
    with pytest.raises(ModelError, match=CASES[damage]) as raised:
        check_model(config, folder)
    assert raised.value.remedy


@pytest.mark.parametrize(("name", "other"), [("sdxl", "sd15"), ("sd15", "sdxl"), ("flux1", "sd3")])
def test_a_denoiser_of_another_family_is_refused(made, tmp_path, name, other):
    folder = shutil.copytree(made(name, {}), tmp_path / "model")
    part = registry.by_name(other).denoiser.part
    config = make_config({"model": str(folder), "transformer": str(made(other, {}) / part)})
    with pytest.raises(ModelError, match="of a denoiser of"):
        check_model(config, folder)
