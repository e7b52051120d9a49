"""Rate and bound are calibrated before the first step; a run that goes on keeps its bound."""

from types import SimpleNamespace

import pytest

from qzo_diffusion.config.files import make_config
from qzo_diffusion.core.journal import Journal
from qzo_diffusion.core.near_base import NearBase
from qzo_diffusion.core.noise import directions_of_step
from qzo_diffusion.core.optimizer import Sgd, Update
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.runs import calibration
from qzo_diffusion.train.calibrate import LrCalibration
from qzo_diffusion.train.distributed import Ranks
from tests.quantized import scaled_network

MEASURED = LrCalibration(slope=0.11, curvature=1.0, error=0.0)  # twice the usual room


@pytest.fixture
def begun(monkeypatch):
    """Calibrates a run that begins, or goes on with a journal of that header.

    Returns the factors and how far a long step takes a number.
    """
    monkeypatch.setattr(calibration, "calibrate", lambda *arguments: MEASURED)

    def begin(header=None, **train):
        config = make_config({"train": train, "prior": {"bound": 0.1}})
        plan = SimpleNamespace(config=config, probing=lambda: None)
        optimizer = NearBase(Sgd(), bound=config.prior.bound)
        parts = SimpleNamespace(optimizer=optimizer, objective=None, batches=None, theta=None)
        journal = None if header is None else Journal(header, (), (), (), "", 0, 0)
        factors = calibration.calibrated_(plan, parts, Ranks(), journal)
        theta = parametrize(scaled_network()[1], "separable")
        directions = directions_of_step(7, 0, 1, "rademacher")
        parts.optimizer.step_(theta, Update(directions, (1.0,), 9.0))
        return factors, max(float(tensor.abs().max()) for tensor in theta.state().values())

    return begin


def test_a_run_that_begins_has_its_bound_times_what_was_measured(begun, capsys):
    factors, moved = begun()
    assert moved == pytest.approx(0.2)
    assert factors.header(bounded=True) == {"lr_factor": 1.0, "bound_factor": pytest.approx(2)}
    assert "prior.bound 0.1 -> 0.2" in capsys.readouterr().err
    assert begun(calibrate_lr=False)[1] == pytest.approx(0.1)


@pytest.mark.parametrize("train", [{}, {"lr": 0.07}, {"calibrate_lr": False}])
def test_a_run_that_goes_on_keeps_its_bound_whatever_its_rate_is(begun, train):
    """Its journal is replayed over one bound."""
    factors, moved = begun({"lr_factor": 0.5, "bound_factor": 0.25}, **train)
    assert moved == pytest.approx(0.025)
    assert factors.rate == (1 if train else 0.5)


def test_nothing_is_told_where_nothing_changes(begun, monkeypatch, capsys):
    unknown = LrCalibration(slope=0.1, curvature=0.1, error=1.0)
    monkeypatch.setattr(calibration, "calibrate", lambda *arguments: unknown)
    assert begun()[1] == pytest.approx(0.1)
    assert capsys.readouterr().err == ""
