"""Signals end a verb with the exit code that docs/usage.md names."""

import os
import signal

from qzo_diffusion.cli import main
from qzo_diffusion.commands import doctor


def test_sigterm_ends_any_verb_as_ctrl_c_does(monkeypatch):
    before, cleaned = signal.getsignal(signal.SIGTERM), []

    def run(_):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            cleaned.append(True)

    monkeypatch.setattr(doctor, "run", run)
    assert main(["doctor"]) == 130
    assert cleaned
    assert signal.getsignal(signal.SIGTERM) == before
