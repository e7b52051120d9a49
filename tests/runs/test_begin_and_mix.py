"""A run begins with what another one tuned; runs are mixed."""

import shutil

import pytest
import torch

from qzo_diffusion.cli import main
from qzo_diffusion.runs.style import pipeline
from qzo_diffusion.runs.tuned import load_scales
from tests.conftest import failing
from tests.runs.short_run import SETTINGS, load_equal, replay, resume, stop_after


def test_a_run_begins_with_what_another_one_tuned(train, whole, tmp_path, capsys, monkeypatch):
    whole = shutil.copytree(whole, tmp_path / "whole")
    on_top = [*SETTINGS, "--seed", 1, "--init-from", tmp_path / "whole"]
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert train(*on_top, name="second") == 130
    told = capsys.readouterr().err
    assert f"begins    with the scales of {whole} after 6 steps" in told
    assert "see --seed" not in told
    train(*SETTINGS, "--init-from", tmp_path / "whole", "--dry-run", name="again")
    assert "both have the seed 0, and draw the same noise" in capsys.readouterr().out
    second = tmp_path / "second"
    assert resume(second) == 0
    assert not load_equal(whole, second)
    assert replay(tmp_path, second, "--to-step", 0, name="before")[0] == 0
    assert load_equal(whole, tmp_path / "before")
    moved = whole.rename(tmp_path / "moved")
    capsys.readouterr()
    assert str(whole) in failing(capsys, replay(tmp_path, second)[0])
    code, out = replay(tmp_path, second, "--init-from", moved)
    assert code == 0
    assert load_equal(second, out)
    capsys.readouterr()
    assert "initial_scales" in failing(
        capsys, replay(tmp_path, second, "--init-from", second, name="wrong")[0]
    )


def test_what_a_run_can_not_begin_with_is_told_before_anything_is_loaded(
    train, whole, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(pipeline, "load_base", lambda *arguments: pytest.fail("loaded"))
    capsys.readouterr()
    assert "quant.blocksize=64" in failing(
        capsys, train("--init-from", whole, "quant.blocksize=128", name="other")
    )
    assert "no tuned scales" in failing(
        capsys, train("--init-from", tmp_path / "nowhere", name="other")
    )
    assert not (tmp_path / "other").exists()


def test_mixing_a_run_with_weight_one_is_the_run(whole, tmp_path):
    assert main(["mix", "--run", f"{whole}=1", "--output-dir", str(tmp_path / "mix")]) == 0
    assert load_equal(whole, tmp_path / "mix")


def test_mixing_half_and_half_of_a_run_is_the_run_within_rounding(whole, tmp_path):
    assert (
        main(
            [
                "mix",
                "--run",
                f"{whole}=0.5",
                "--run",
                f"{whole}=0.5",
                "--output-dir",
                str(tmp_path / "mix"),
            ]
        )
        == 0
    )
    mixed, tuned = load_scales(tmp_path / "mix")[0], load_scales(whole)[0]
    for name, tensor in tuned.items():
        torch.testing.assert_close(mixed[name], tensor, rtol=1e-6, atol=0)


def test_a_checkpoint_is_mixed_with_its_run_s_settings(train, tmp_path, monkeypatch, capsys):
    assert train(*SETTINGS, "quant.blocksize=128", name="coarse") == 0
    checkpoint = tmp_path / "coarse/checkpoints/step_000004"
    assert main(["mix", "--run", f"{checkpoint}=1", "--output-dir", str(tmp_path / "mix")]) == 0
    assert load_equal(checkpoint, tmp_path / "mix")
    # what is there already is found before anything is loaded
    monkeypatch.setattr(pipeline, "load_base", None)
    capsys.readouterr()
    error = failing(
        capsys, main(["mix", "--run", f"{checkpoint}=1", "--output-dir", str(tmp_path / "mix")])
    )
    assert "--resume" not in error


@pytest.mark.parametrize("part", ["nowhere=1", "nowhere", "=1", "nowhere=much"])
def test_bad_parts_of_a_mix_are_told(tmp_path, capsys, part):
    failing(capsys, main(["mix", "--run", part, "--output-dir", str(tmp_path / "mix")]))
