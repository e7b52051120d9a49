"""Two ranks on two cores against one rank on one core: `OMP_NUM_THREADS=1 python -m
benchmarks.scale_out`.

Two processes stay alive, each pinned to a core of its own, and do the same steps on `tiny` in
turns: rank 0 alone while the other sleeps; both as ranks of one run with the same work each, so
twice the batch; both at the same time as runs of their own that exchange nothing. The first pair of
figures is what data parallelism gives here, the last is all that this machine could give. Each
figure is the median over the rounds of a ratio inside one round. Where other programs share the
processor, the machine's own figure falls below 2 in some rounds; the quiet ones, in which it was at
least 1.9, are therefore told apart. Bytes are counted by the program and, as a check, by the kernel
for the connections of rank 0, with gloo's own headers."""

import argparse
import json
import os
import socket
import stat
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import write_results
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.optimizer import Sgd
from qzo_diffusion.core.probing import Probing, StepBatch
from qzo_diffusion.core.spsa import no_reduce
from qzo_diffusion.diffusion.families.family import model_loss
from qzo_diffusion.diffusion.families.sd3 import SD3
from qzo_diffusion.diffusion.flow_matching import Batch
from qzo_diffusion.runs.style import pipeline
from qzo_diffusion.train.distributed import Ranks, join, leave
from qzo_diffusion.train.loop import Setup, train

BATCH, TOKENS, SIDE = 16, 32, 8  # examples a rank, of the size that `tiny` trains at
# times the work of one core that two processes without any exchange must do for a round to count as
# quiet
MIDDLE_BLOCKS = 1.9
# of tcpi_bytes_acked in Linux' struct tcp_info, followed by tcpi_bytes_received
BYTES_SENT_AT = 120


def steps_on_tiny(dense: bool) -> Callable[[int, Callable[..., list[float]]], None]:
    """A function that does so many steps of the product's own loop with this exchange."""
    config = Config(model="tiny")
    config.qzo.parametrization = "dense" if dense else "layer"
    place = pipeline.find_runtime(config)
    transformer, _, theta = pipeline.load_base(config, place)
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(BATCH, 16, SIDE, SIDE, generator=generator) for _ in range(2))
    embeds = torch.randn(BATCH, TOKENS, transformer.config.joint_attention_dim, generator=generator)  # type: ignore[union-attr]
    pooled = torch.randn(BATCH, transformer.config.pooled_projection_dim, generator=generator)  # type: ignore[union-attr]
    batch = Batch(latents, noise, torch.rand(BATCH, generator=generator), embeds, pooled)

    def go(count: int, sum_over_ranks: Callable[..., list[float]]) -> None:
        setup = Setup(
            lambda one: model_loss(SD3, transformer, one, torch.float32),
            lambda step: StepBatch([batch]),
            theta,
            Sgd(),
            Probing(seed=0, eps=1e-2),
            lambda step: 1e-9,
            sum_over_ranks,
        )
        train(setup, max_steps=count)

    return go


def kernel_bytes() -> tuple[int, int]:
    """Bytes that this process' TCP connections have sent and received so far, without packet
    headers.
    """
    sent = received = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # closed meanwhile, or not of TCP
            continue
        acked, got = struct.unpack_from("<QQ", info, BYTES_SENT_AT)
        sent, received = sent + acked, received + got
    return sent, received


def timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def one_rank(rank: int, steps: int, rounds: int, file: Path) -> None:
    """What each of the two processes does.

    Both pass the same exchanges, so that nobody starts a phase early.
    """
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    ranks: Ranks = join(300)
    go = steps_on_tiny(dense=True)
    go(3, ranks.sum)
    found: dict[str, list[Any]] = {
        "one_rank": [],
        "two_ranks": [],
        "two_alone": [],
        "bytes": [],
        "kernel": [],
    }
    for _ in range(rounds):
        ranks.wait()
        if ranks.first:
            found["one_rank"].append(timed(lambda: go(steps, no_reduce)))
        ranks.wait()
        sent, before = ranks.bytes_sent, kernel_bytes()
        found["two_ranks"].append(timed(lambda: go(steps, ranks.sum)))
        found["bytes"].append((ranks.bytes_sent - sent) / steps)
        found["kernel"].append(
            [(now - then) / steps for now, then in zip(kernel_bytes(), before, strict=True)]
        )
        ranks.wait()
        found["two_alone"].append(timed(lambda: go(steps, no_reduce)))
    ranks.wait()
    file.write_text(json.dumps(found))
    leave()


def ratio(one: list[float], two: list[float]) -> float:
    """How many times the work of one is done in the same time."""
    return round(statistics.median(2 * a / b for a, b in zip(one, two, strict=True)), 4)


def figures(first: dict[str, Any], second: dict[str, Any], steps: int) -> dict[str, Any]:
    together = [max(pair) for pair in zip(first["two_ranks"], second["two_ranks"], strict=True)]
    apart = [max(pair) for pair in zip(first["two_alone"], second["two_alone"], strict=True)]
    ratios = [
        (2 * a / b, 2 * a / c) for a, b, c in zip(first["one_rank"], together, apart, strict=True)
    ]
    quiet = [achieved for achieved, possible in ratios if possible >= MIDDLE_BLOCKS]
    siblings = Path("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list")
    achieved, ceiling = ratio(first["one_rank"], together), ratio(first["one_rank"], apart)
    return {
        "throughput_ratio": achieved,
        "ceiling_of_this_machine": ceiling,
        "throughput_ratio_in_quiet_rounds": round(statistics.median(quiet), 4) if quiet else None,
        "quiet_rounds": len(quiet),
        "throughput_over_ceiling": ratio(apart, [2 * seconds for seconds in together]),
        "rounds": [
            {"one_rank": round(a, 4), "two_ranks": round(b, 4), "two_alone": round(c, 4)}
            for a, b, c in zip(first["one_rank"], together, apart, strict=True)
        ],
        "bytes_per_step": max(first["bytes"] + second["bytes"]),
        "kernel_bytes_per_step": {
            "sent": statistics.median(sent for sent, _ in first["kernel"]),
            "received": statistics.median(received for _, received in first["kernel"]),
        },
        "median_ms_per_step": {
            "one_rank": round(1e3 * statistics.median(first["one_rank"]) / steps, 2),
            "two_ranks": round(1e3 * statistics.median(together) / steps, 2),
            "two_alone": round(1e3 * statistics.median(apart) / steps, 2),
        },
        "threads_of_the_first_core": siblings.read_text().strip() if siblings.exists() else None,
        "examples_a_rank": BATCH,
        "steps_a_phase": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--steps", type=int, default=4, help="of each phase")
    parser.add_argument(
        "--rank-file",
        type=Path,
        help="be one of the two processes and leave its figures here (used by the whole run)",
    )
    args = parser.parse_args()
    if args.rank_file:
        one_rank(int(os.environ["RANK"]), args.steps, args.rounds, args.rank_file)
        return
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        probe.close()
        files = [Path(folder) / f"{rank}.json" for rank in range(2)]
        processes = []
        for rank, file in enumerate(files):
            command = [sys.executable, "-m", "benchmarks.scale_out", "--rank-file", str(file)]
            command += ["--rounds", str(args.rounds), "--steps", str(args.steps)]
            places = {
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
            }
            processes.append(subprocess.Popen(command, env=os.environ | places))
        codes = [process.wait() for process in processes]
        if any(codes):
            sys.exit("a rank failed")
        first, second = (json.loads(file.read_text()) for file in files)
        found = figures(first, second, args.steps)
    print(
        write_results("scale_out", found),
        json.dumps({key: value for key, value in found.items() if key != "rounds"}),
    )


if __name__ == "__main__":
    main()
