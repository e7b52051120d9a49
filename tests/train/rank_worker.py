"""What each of three processes does for test_distributed.py: one scenario after the other, since
starting torch is what costs.

The model is a quadratic in float64: outputs x ∘ s of trained scales s, one loss Σ (x ∘ s - 1)² per
example."""

import json
import os
import signal
import time

import torch
from torch import nn

from qzo_diffusion.core.errors import RankLost
from qzo_diffusion.core.optimizer import make_optimizer, make_schedule
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.core.probing import Probing, StepBatch
from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.quant.base import fingerprint
from qzo_diffusion.train import distributed
from qzo_diffusion.train.distributed import join, leave
from qzo_diffusion.train.loop import Setup, train

NUMBERS, EXAMPLES, STEPS, LR, EPS = 12, 8, 6, 0.01, 1e-2
HANGING = 5  # seconds without an answer, then a rank counts as lost
CASES = {
    "one direction": {"level": "dense", "units": "absolute"},
    "two directions": {"level": "row", "optimizer": "adam", "num_directions": 2},
    "per example": {"level": "row", "optimizer": "momentum", "per_example": True},
}


class Diagonal(nn.Module):
    def __init__(self, scales):
        super().__init__()
        self.scales, self.out_features, self.bias = scales, len(scales), None

    def forward(self, x):
        return x * self.scales


class Handle:
    def __init__(self, module):
        self.name, self.module = "diagonal", module

    @property
    def scales(self):
        return self.module.scales

    def override(self, scales):
        self.module.scales = scales


def run(ranks, *, level, units="relative", optimizer="sgd", before=lambda step: None, **probing):
    """Six steps of this rank's share of the batches; everything that ranks and single processes
    must agree on.
    """
    model = Diagonal(torch.linspace(0.5, 1.5, NUMBERS, dtype=torch.float64))
    scales = ScaleSet([Handle(model)])
    theta, records = parametrize(scales, level, units), []

    def batch(step):
        before(step)
        x = torch.randn(
            EXAMPLES, NUMBERS, generator=torch.Generator().manual_seed(step), dtype=torch.float64
        )
        share = ranks.share(EXAMPLES)
        return StepBatch(list(x[share].split(2)), first_example=share.start, examples=EXAMPLES)

    setup = Setup(
        lambda x: (model(x) - 1).square().sum(-1),
        batch,
        theta,
        make_optimizer(optimizer),
        Probing(seed=5, eps=EPS, **probing),
        make_schedule("constant", LR, STEPS),
        ranks.sum,
    )
    outcome = train(
        setup, max_steps=STEPS, on_step=records.append, stop_requested=ranks.stop_agreed
    )
    told = [
        {
            "loss": record.loss,
            "loss_plus": list(record.estimate.loss_plus),
            "loss_minus": list(record.estimate.loss_minus),
            "projected_grad": list(record.estimate.projected_grad),
        }
        for record in records
    ]
    trained = {name: tensor.tolist() for name, tensor in theta.state().items()}
    return {
        "records": told,
        "numbers": trained,
        "steps": outcome.steps_done,
        "stopped": outcome.stopped,
    }, theta


def lost_after(action):
    """The message of RankLost, and how long it took."""
    began = time.monotonic()
    try:
        action()
    except RankLost as error:
        return {"message": str(error), "seconds": time.monotonic() - began}
    return None


def main(index, out, limit, ports):
    found = {}

    def tell():
        (out / f"process_{index}.json").write_text(json.dumps(found))

    def become(rank, world, port, timeout):
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
        )
        return join(timeout)

    distributed.ROLL_CALL_SECONDS = 1.0
    ranks = become(index, 3, ports[0], limit)
    found["share"] = [ranks.share(EXAMPLES).start, ranks.share(EXAMPLES).stop]
    for name, case in CASES.items():
        sent = ranks.bytes_sent
        found[name], theta = run(ranks, **case)
        found[name]["bytes"] = ranks.bytes_sent - sent
    ranks.check_equal(bytes.fromhex(fingerprint(theta.state().items())), "numbers")
    if index == 2:
        theta.by_axis["row"][3] += 1e-15
    found["deviating"] = lost_after(
        lambda: ranks.check_equal(bytes.fromhex(fingerprint(theta.state().items())), "numbers")
    )

    ranks.wants_stop = lambda: index == 1 and current[0] == 2
    current = [0]
    found["stop"], _ = run(ranks, level="row", before=lambda step: current.__setitem__(0, step))
    ranks.wants_stop = lambda: False
    ranks.wait()
    tell()

    def sends_itself(what, rank):
        return lambda step: os.kill(os.getpid(), what) if (index, step) == (rank, 3) else None

    found["died"] = lost_after(
        lambda: run(ranks, level="row", before=sends_itself(signal.SIGKILL, rank=2))
    )
    leave()

    ranks = become(index, 2, ports[1], limit)
    sent, exchanges = ranks.bytes_sent, ranks.exchanges
    found["pair"], _ = run(ranks, level="row")
    found["pair"] |= {"bytes": ranks.bytes_sent - sent, "exchanges": ranks.exchanges - exchanges}
    tell()
    ranks.wait()  # or the busier of the two might come too late for the next, which waits for less
    leave()

    ranks = become(index, 2, ports[2], HANGING)
    found["hung"] = lost_after(
        lambda: run(ranks, level="row", before=sends_itself(signal.SIGSTOP, rank=1))
    )
    tell()
