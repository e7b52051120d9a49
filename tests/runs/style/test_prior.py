"""`prior.weight`: a run is held to the base's own predictions on pictures without the style."""

import json

import pytest
import torch

from qzo_diffusion.cli import main
from qzo_diffusion.config.files import make_config
from qzo_diffusion.core.errors import ConfigError
from qzo_diffusion.core.journal import read_journal
from qzo_diffusion.core.spsa import probe
from qzo_diffusion.diffusion.flow_matching import Batch
from qzo_diffusion.runs.style.batches import parts_within
from qzo_diffusion.runs.style.plan import make_plan
from qzo_diffusion.train.distributed import Ranks
from tests.conftest import failing, metrics, write_images
from tests.runs.short_run import assert_replayed, assert_same_run, in_parts

PRIOR = ["prior.weight=0.5", "prior.batch_size=3", "--max-steps", 4, "train.checkpoint_every=2"]


@pytest.fixture
def plan(images, prompts, pipeline, cache):
    """Plans a run with further settings."""

    def build(**prior):
        settings = {
            "model": str(pipeline),
            "data": {"style_dir": str(images), "batch_size": 4, "cache_dir": cache},
            "sample": {"steps": 2, "prompts": str(prompts)},
            "compute": {"dtype": "float32", "device": "cpu"},
            "prior": {"weight": 1.0, **prior},
        }
        return make_plan(make_config(settings))

    return build


def losses_at(components, batch):
    """One loss for each example, at θ and at a θ far from the base."""
    found = []
    for amount in (0.0, 0.3):
        for tensor in components.theta.state().values():
            tensor.fill_(amount)
        with components.scales.override(components.theta.perturbed()):
            losses = [components.objective(one) for one in batch.micro_batches]
        found.append(torch.cat(losses).flatten(1).mean(1))
    return found


def test_examples_of_the_prior_have_no_loss_at_the_base(plan, prompts):
    components = plan(prompts=str(prompts), batch_size=3).load(Ranks())
    batch = components.batches(5)
    assert batch.whole == 7
    base, far = losses_at(components, batch)
    assert base[4:].max() < 1e-9 < base[:4].min()
    assert far[4:].min() > 1e-6
    again = torch.cat([one.latents for one in components.batches(5).micro_batches])
    assert torch.equal(again, torch.cat([one.latents for one in batch.micro_batches]))


def test_the_style_keeps_its_examples_and_the_weight_scales_the_priors_losses(plan, prompts):
    far = {}
    for weight in (0.0, 1.0, 0.25):
        source = {"prompts": str(prompts)} if weight else {}
        components = plan(weight=weight, **source).load(Ranks())
        far[weight] = losses_at(components, components.batches(2))[1]
    for weight in (1.0, 0.25):
        torch.testing.assert_close(far[weight][:4], far[0.0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(far[weight][4:], weight * far[1.0][4:], rtol=1e-4, atol=1e-7)


def test_every_rank_takes_its_share_of_both_parts():
    examples = [Batch(*(torch.arange(8.0)[at : at + 4] for _ in range(5))) for at in (0, 4)]
    for share in (slice(0, 3), slice(2, 7), slice(5, 8)):
        found = torch.cat([part.sigma for part in parts_within(examples, share)])
        assert found.tolist() == list(range(share.start, share.stop))


def test_noisy_inputs_stay_and_the_target_is_any_velocity():
    generator = torch.Generator().manual_seed(0)
    latents, noise, velocity = (torch.randn(4, 2, 4, 4, generator=generator) for _ in range(3))
    batch = Batch(latents, noise, torch.linspace(0, 1, 4), torch.zeros(4, 1), torch.zeros(4, 1))
    turned = batch.towards(velocity)
    torch.testing.assert_close(turned.noisy, batch.noisy)
    torch.testing.assert_close(turned.noise - turned.latents, velocity)
    assert not torch.allclose(batch.noise - batch.latents, velocity)


def test_the_estimate_of_style_examples_is_theirs_alone(plan, prompts):
    one = plan(prompts=str(prompts), batch_size=3)
    components = one.load(Ranks())
    batch, probing = components.batches(0), one.probing()
    found = probe(components.objective, batch, components.theta, probing, 0)
    assert len(found.loss_plus) == 7 * probing.num_directions * batch.patch_groups
    derivative = torch.tensor(found.directional_derivative).view(probing.num_directions, 7, -1)
    # the loss of the prior is flat at the base
    assert derivative[:, 4:].abs().mean() < 0.2 * derivative[:, :4].abs().mean()


def test_a_run_goes_on_and_is_replayed_bit_for_bit(train, prompts, tmp_path, monkeypatch):
    settings = [*PRIOR, f"prior.prompts={prompts}", "train.calibrate_lr=true"]
    assert train(*settings, name="whole") == 0
    parts = in_parts(train, tmp_path, monkeypatch, *settings, after=2)
    assert_same_run(tmp_path / "whole", parts)
    assert_replayed(tmp_path / "whole")
    header = read_journal(tmp_path / "whole/journal.qzo").header
    assert header["examples"] % (4 + 3) == 0
    assert (tmp_path / "whole/samples/prior.png").is_file()
    rows = json.loads((tmp_path / "whole/dataset.json").read_text())
    drawn = [row for row in rows if row["split"] == "prior"]
    assert [row["caption"] for row in drawn] == ["red apple", "banana"]
    prompts.write_text("red apple\ncherry\n")
    assert main(["train", "--resume", str(tmp_path / "whole"), "--max-steps", "4"]) == 2


def test_a_run_that_is_stopped_while_the_prior_is_drawn_goes_on(
    train, prompts, tmp_path, monkeypatch
):
    from qzo_diffusion.runs.style import prior

    def interrupted(latents):
        raise KeyboardInterrupt

    settings = [*PRIOR, f"prior.prompts={prompts}", "train.seed=77"]
    with monkeypatch.context() as patch:
        patch.setattr(prior, "_check_finite", interrupted)
        assert train(*settings) == 130
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert len(metrics(tmp_path / "run")) == 4


@pytest.mark.parametrize("more", [[], ["method=fo-scales", "qzo.parametrization=row"]])
def test_pictures_of_a_folder(train, tmp_path, more, capsys):
    write_images(tmp_path / "others")
    assert train(*PRIOR, f"prior.dir={tmp_path / 'others'}", *more) == 0
    told = capsys.readouterr().err
    assert "6 pictures of a folder, weight 0.5" in told
    assert "6 of its pictures are images of the style as well" in told
    if not more:
        assert "4 images + 3 of the prior" in told


@pytest.mark.parametrize("more", ["qzo.parametrization=dense", "method=fo-scales"])
def test_scales_that_are_trained_in_place_have_no_base(train, tmp_path, more, capsys):
    """Its prediction would be the tuned model's own."""
    assert "qzo.parametrization=row" in failing(capsys, train("prior.weight=1", more))
    assert not (tmp_path / "run").exists()


def test_a_folder_without_captions_is_refused(train, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    error = failing(capsys, train("prior.weight=1", f"prior.dir={tmp_path / 'empty'}"))
    assert "prior.dir: " in error


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prior": {"weight": 1, "prompts": "a", "dir": "b"}}, "prior.prompts or prior.dir"),
        ({"prior": {"dir": "b"}}, "prior.weight above 0"),
        ({"prior": {"batch_size": 2}}, "no prior.batch_size"),
        (
            {"prior": {"weight": 1}, "method": "quzo", "qzo": {"parametrization": "codes"}},
            "prior.weight: 0",
        ),
    ],
)
def test_settings_that_can_not_work_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        make_config(settings)


def test_the_base_answers_though_theta_has_moved(plan, prompts):
    components = plan(prompts=str(prompts)).load(Ranks())
    before = torch.cat([one.latents for one in components.batches(3).micro_batches])
    for tensor in components.theta.state().values():
        tensor.fill_(0.5)
    after = torch.cat([one.latents for one in components.batches(3).micro_batches])
    assert torch.equal(before, after)
