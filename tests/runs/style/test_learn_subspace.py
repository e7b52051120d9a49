"""`qzo-diffuse subspace`: a base's own styles become directions that runs go along."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qzo_diffusion.cli import main
from qzo_diffusion.runs.spanned import GRADIENTS, PLACES, WEIGHT, spanned
from qzo_diffusion.runs.style import learn_subspace
from qzo_diffusion.runs.subspace import FILE
from tests.conftest import failing

STYLES = ["black", "light"]
ROWS = ["qzo.parametrization=row", "qzo.layers=[ff.net,attn.to_out]", "qzo.regions=4"]


def write_ways(folder, keys=("row", "row.pointwise"), steps=4, rows=(8, 12), count=3):
    generator = torch.Generator().manual_seed(0)
    paths = []
    for at in range(count):
        way = {}
        for key in keys:
            for layer, size in enumerate(rows):
                name = f"{key}/{key}_{layer}"
                way[f"{name}/{GRADIENTS}"] = 1e-3 * torch.randn(steps, size, generator=generator)
                way[f"{name}/{PLACES}"] = torch.randn(1, size, generator=generator)
        paths.append(folder / f"{at:02d}.safetensors")
        save_file(way, paths[-1])
    return paths


@pytest.mark.parametrize("key", ["row", "row.pointwise"])
def test_directions_are_singular_vectors_by_their_values(tmp_path, key):
    paths = write_ways(tmp_path)
    found = spanned(paths, count=6)
    ways = [load_file(path) for path in paths]
    layers = [f"{key}_0", f"{key}_1"]

    def rows(kind):
        of_ways = [torch.cat([way[f"{key}/{one}/{kind}"] for one in layers], dim=1) for way in ways]
        return torch.cat(of_ways).double()

    slopes, places = rows(GRADIENTS), rows(PLACES)
    slopes = slopes / slopes.norm(dim=1, keepdim=True)
    places = places * (WEIGHT / places.norm(dim=1).mean())
    _, sizes, vectors = torch.linalg.svd(torch.cat([slopes, places]), full_matrices=False)
    b = torch.cat([found[one] for one in layers], dim=1).double()
    assert b.shape == (6, 20)
    assert b.square().sum(0).mean() == pytest.approx(1, abs=1e-3)
    cosines = (b / b.norm(dim=1, keepdim=True)) @ vectors[:6].T
    torch.testing.assert_close(cosines.abs(), torch.eye(6).double(), atol=5e-3, rtol=0)
    ratios = b.norm(dim=1) / b.norm(dim=1)[0]
    torch.testing.assert_close(ratios, sizes[:6] / sizes[0], atol=1e-3, rtol=1e-3)


def test_there_are_no_more_directions_than_rows_of_the_ways(tmp_path):
    found = spanned(write_ways(tmp_path, count=1), count=256)
    assert {len(one) for one in found.values()} == {5}  # 4 gradients and a place
    assert all(one.isfinite().all() for one in found.values())


@pytest.fixture
def command(tmp_path, pipeline, cache):
    styles, things = tmp_path / "styles.txt", tmp_path / "things.txt"
    styles.write_text("\n".join(STYLES))
    things.write_text("a square\na circle")
    names = ["--model", pipeline, "--styles", styles, "--prompts", things]
    settings = [f"data.cache_dir={cache}", "sample.steps=2", "compute.dtype=float32"]
    settings += ["data.batch_size=2", "qzo.layers=[ff.net,attn.to_out]"]

    def build(*arguments, name="learnt"):
        output = ["--output-dir", tmp_path / name, "--max-steps", 2]
        return [str(part) for part in ["subspace", *names, *output, *settings, *arguments]]

    return build


def test_the_file_of_a_base_is_learnt_and_a_run_goes_along_it(
    command, tmp_path, train, monkeypatch, capsys
):
    assert main(command()) == 0
    assert "qzo.subspace=" in capsys.readouterr().err
    names = {one.name for one in (tmp_path / "learnt").iterdir()}
    assert names == {"settings.json", "pictures", "pictures.png", "ways", FILE}
    whole = (tmp_path / "learnt" / FILE).read_bytes()
    captions = (tmp_path / "learnt/pictures/01/metadata.jsonl").read_text()
    assert "a circle" in captions
    assert "light" not in captions
    with monkeypatch.context() as patch:
        followed = []

        def stopped(plan, style, bar):
            if followed:
                raise KeyboardInterrupt
            followed.append(plan)
            return follow(plan, style, bar)

        follow = learn_subspace._follow
        patch.setattr(learn_subspace, "_follow", stopped)
        assert main(command(name="parts")) == 130
    assert "goes on" in capsys.readouterr().err
    assert [one.name for one in (tmp_path / "parts/ways").iterdir()] == ["00.safetensors"]
    assert main(command(name="parts")) == 0
    assert (tmp_path / "parts" / FILE).read_bytes() == whole

    file = tmp_path / "learnt" / FILE
    assert train("--max-steps", 2, *ROWS, f"qzo.subspace={file}") == 0


def test_pictures_are_the_base_s_and_the_ways_leave_it(command, tmp_path):
    assert main(command("--max-steps", 8, "--directions", "3")) == 0
    directions = load_file(tmp_path / "learnt" / FILE)
    assert {len(one) for one in directions.values()} == {3}
    way = load_file(tmp_path / "learnt/ways/00.safetensors")
    places = [one for name, one in way.items() if name.endswith(PLACES)]
    assert all(len(one) == 1 for one in places)  # one for every eight steps
    assert max(one.abs().max() for one in places) > 0.01


def test_other_settings_words_and_methods_are_refused(command, tmp_path, capsys):
    folder = tmp_path / "learnt"
    folder.mkdir()
    begun = {"settings": {"train": {"seed": 7}}, "styles": ["black"]}
    begun["prompts"] = ["a square", "a circle"]
    (folder / "settings.json").write_text(json.dumps(begun))
    error = failing(capsys, main(command()))
    assert "other styles" in error
    assert "train.seed: 7 -> 0" in error
    assert "data.cache_dir" not in error
    refused = command("method=qzo", name="other")
    assert "exact gradients of rows" in failing(capsys, main(refused))
    refused = command("qzo.parametrization=dense", name="other")
    failing(capsys, main(refused))
    (tmp_path / "styles.txt").write_text("\n")
    failing(capsys, main(command(name="other")))
    failing(capsys, main(command("--prompts", tmp_path / "none.txt", name="other")))
    assert not (tmp_path / "other").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    (tmp_path / "styles.txt").write_text("black")
    failing(capsys, main(command(name="full")))
    assert [one.name for one in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_damage_is_told_with_what_to_remove(command, tmp_path, capsys):
    folder = tmp_path / "learnt"
    assert main(command("--max-steps", 1)) == 0
    whole = (folder / FILE).read_bytes()
    picture, way = folder / "pictures/00/001.png", folder / "ways/01.safetensors"
    for path in (picture, way, folder / "settings.json"):
        kept = path.read_bytes()
        if path is picture:
            path.unlink()
        else:
            path.write_bytes(kept[:-20])
        error = failing(capsys, main(command("--max-steps", 1)))
        assert "damaged" in error
        assert str(path.parent if path is picture else path) in error
        path.write_bytes(kept)
    (folder / FILE).unlink()
    assert main(command("--max-steps", 1)) == 0
    assert (folder / FILE).read_bytes() == whole
    failing(capsys, main(command("--max-steps", 0, name="none")))
    error = failing(capsys, main(command("train.lr=1e30", name="far")))
    assert "not finite" in error
