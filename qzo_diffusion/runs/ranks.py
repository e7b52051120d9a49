"""Check that the processes of one run all do the same."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from qzo_diffusion.config.sections import TrainConfig
from qzo_diffusion.core.parametrization import Parametrization
from qzo_diffusion.quant.base import fingerprint
from qzo_diffusion.train.distributed import Ranks

CHECK_EVERY = 100  # steps


def check_ranks(ranks: Ranks, theta: Parametrization) -> None:
    """Check that theta is equal on all ranks. Every rank calls this after the same step.

    Raises:
        RankLost: theta of a rank differs.
    """
    if ranks.world > 1:
        ranks.check_equal(bytes.fromhex(fingerprint(theta.state().items())), "trained numbers")


def agree_on_end(ranks: Ranks, train: TrainConfig, steps_done: int) -> None:
    """Let rank 0 tell the others whether held-out losses end the run at this step.

    Every rank calls this after the same step. Other ends are told with the sums of the next step.
    """
    if train.patience is not None and steps_done % train.validate_every == 0:
        ranks.wait()


def check_same_run(
    ranks: Ranks,
    settings: Mapping[str, Any],
    data: Sequence[Mapping[str, Any]],
    facts: Sequence[str],
    header: Mapping[str, Any],
) -> None:
    """Check that all ranks were started with the same model, data and settings.

    Args:
        settings: all but folders, which may differ by machine.
        data: the rows of dataset.json.
        facts: the columns of `data` that identify the run.

    Raises:
        RankLost: a rank was started with others.
    """
    base = [header[name] for name in ("codes", "initial_scales")]
    rows = [[row["file"], *(row[fact] for fact in facts)] for row in data]
    text = json.dumps([settings, base, rows], sort_keys=True, default=str)
    ranks.check_equal(
        hashlib.blake2b(text.encode(), digest_size=16).digest(), "model, data or settings"
    )
