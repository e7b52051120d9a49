"""Several processes that tune one model and exchange nothing but loss sums.

Every rank holds the whole quantized model and draws the same directions from the seed. It evaluates
its share of the batch. The sums of losses at the probes are gathered and added in the order of
ranks, so every rank computes the same derivative and applies the same update. Nothing of the size
of the model is ever sent: with one direction a rank sends 32 bytes a step to each other rank.

Scalars travel over gloo on the CPU, also where the model is on a GPU: for a few bytes only latency
counts."""

import contextlib
import ipaddress
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch

from qzo_diffusion.core.errors import ConfigError, RankLost

ROLL_CALL_SECONDS = 3.0
LONGEST_NAP_SECONDS = 2e-3
# How torchrun, Intel MPI or MPICH, Open MPI and MVAPICH give a process its rank; on CPUs
# `accelerate launch` leaves it to mpirun.
PLACES = (
    ("RANK", "WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
)


@dataclass
class Ranks:
    """This process among `world`. Alone, nothing is exchanged.

    `bytes_sent` counts the bytes sent to the others, each of which receives them once.
    """

    rank: int = 0
    world: int = 1
    store: Any = None
    wants_stop: Callable[[], bool] = lambda: False
    bytes_sent: int = field(default=0, init=False)
    exchanges: int = field(default=0, init=False)
    _agreed_to_stop: bool = field(default=False, init=False)

    @property
    def first(self) -> bool:
        """Whether this rank writes files and messages."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """The examples of a batch of `count` that are this rank's."""
        return slice(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks in float64, added in the order of ranks: bit for bit the same on
        every rank.

        Raises:
            RankLost: a rank died or did not answer in time.
        """
        if self.world == 1:
            return list(values)
        gathered = self._gather(
            torch.tensor([*values, float(self.wants_stop())], dtype=torch.float64)
        )
        total = gathered[0].clone()
        for part in gathered[1:]:
            total += part
        self._agreed_to_stop = total[-1].item() > 0
        return total[:-1].tolist()

    def stop_agreed(self) -> bool:
        """Whether any rank wanted to stop at the last exchange: the same on all ranks."""
        return self.wants_stop() if self.world == 1 else self._agreed_to_stop

    def check_equal(self, digest: bytes, what: str) -> None:
        """Raises RankLost when a rank's digest is another than rank 0's."""
        if self.world == 1:
            return
        gathered = self._gather(torch.tensor(list(digest), dtype=torch.uint8))
        wrong = [rank for rank, other in enumerate(gathered) if not torch.equal(other, gathered[0])]
        if wrong:
            raise RankLost(
                f"rank {wrong[0]} has other {what} than rank 0",
                "the same on every rank, bit for bit",
                "use the same command, files, versions and kind of processor on every rank; "
                "go on with --resume",
            )

    def wait(self) -> None:
        """Return when every rank has come here."""
        self.sum([0.0])

    def _gather(self, mine: torch.Tensor) -> list[torch.Tensor]:
        import torch.distributed as dist

        gathered = [torch.empty_like(mine) for _ in range(self.world)]
        try:
            work = dist.all_gather(gathered, mine, async_op=True)
            _nap_until(work.is_completed)
            work.wait()
        except RuntimeError as error:
            raise self._lost(error) from error
        self.bytes_sent += mine.numel() * mine.element_size() * (self.world - 1)
        self.exchanges += 1
        return gathered

    def _lost(self, error: Exception) -> RankLost:
        # the neighbours that still wait for this rank see the connection close, and sign in time
        leave()
        missing = self._roll_call()
        names = ", ".join(f"rank {rank}" for rank in missing) or "a rank"
        return RankLost(
            f"{names} died or did not answer at exchange {self.exchanges} ({_first_line(error)})",
            f"an answer from all {self.world} ranks",
            "look at that rank's output, then start again with --resume; another number of "
            "ranks is fine",
        )

    def _roll_call(self) -> list[int]:
        """The ranks that do not answer: each survivor signs in the store."""
        prefix, missing = f"survivors/{self.exchanges}", list[int]()

        def sign_and_read() -> None:
            try:
                self.store.set(f"{prefix}/{self.rank}", b"here")
                time.sleep(ROLL_CALL_SECONDS)
                missing.extend(
                    rank for rank in range(self.world) if not self.store.check([f"{prefix}/{rank}"])
                )
            except RuntimeError:  # the store went down with the rank that kept it
                missing.append(0)

        # In a thread that may be left behind: a store whose keeper hangs is waited for without any
        # limit.
        caller = threading.Thread(target=sign_and_read, daemon=True)
        caller.start()
        caller.join(3 * ROLL_CALL_SECONDS)
        return [0] if caller.is_alive() else missing


def join(timeout_seconds: float) -> Ranks:
    """This process among those that `torchrun` or `accelerate launch` started; alone when neither
    did.

    Args:
        timeout_seconds: how long to wait for the others, now and at every exchange.

    Raises:
        RankLost: the others did not come in time.
        ConfigError: the environment says that there are others and not where.
    """
    place = next(
        (names for names in PLACES if all(name in os.environ for name in names)), PLACES[0]
    )
    rank_text, world_text = (os.environ.get(name, "") for name in place)
    if world_text in ("", "1"):
        return Ranks()
    import torch.distributed as dist

    timeout = timedelta(seconds=timeout_seconds)
    try:
        rank, world = int(rank_text), int(world_text)
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (ValueError, KeyError):
        raise ConfigError(
            f"{place[1]}={world_text} in the environment without a whole set of the other three",
            f"{place[0]}, {place[1]}, MASTER_ADDR and MASTER_PORT, or none of them",
            f"start with torchrun or accelerate launch; for a single process unset {place[1]}",
        ) from None
    # torchrun keeps the store itself; elsewhere rank 0 does.
    keeps_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        listening = _listen(address, port) if keeps_store else None
        store = dist.TCPStore(
            address,
            port,
            world,
            keeps_store,
            timeout,
            multi_tenant=True,
            master_listen_fd=listening,
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        named = dist.PrefixStore(f"qzo_diffusion/{attempt}", store)
        with _kept_on(loopback_interface(address)):
            dist.init_process_group(
                "gloo", store=named, rank=rank, world_size=world, timeout=timeout
            )
    except RuntimeError as error:
        raise RankLost(
            f"not all of {world} ranks came within {timeout_seconds:g} s ({_first_line(error)})",
            "every rank started, and a free port that all of them reach",
            "look at the output of every rank; give more time with compute.rank_timeout",
        ) from error
    return Ranks(rank, world, named)


def _listen(address: str, port: int) -> int | None:
    """A socket that listens on the address alone; TCPStore itself listens on every interface.

    None where the address is not one of this machine's own, as behind a proxy, or in use.
    """
    try:
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((address, port), family=family, backlog=1024).detach()
    except OSError:
        return None


def loopback_interface(address: str) -> str | None:
    """The name of the loopback interface where `address` lies on it: all ranks are on one machine.

    None elsewhere.
    """
    try:
        found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
    except OSError:
        return None
    if not all(ipaddress.ip_address(str(entry[4][0])).is_loopback for entry in found):
        return None
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), None)


@contextlib.contextmanager
def _kept_on(interface: str | None) -> Iterator[None]:
    """Let gloo listen on this interface, unless the environment names one already."""
    name = "GLOO_SOCKET_IFNAME"
    if interface is None or name in os.environ:
        yield
        return
    os.environ[name] = interface
    try:
        yield
    finally:
        del os.environ[name]


def leave() -> None:
    """Close the connections to the other ranks; nothing when there are none."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # what is broken already needs no closing
            dist.destroy_process_group()


def _nap_until(done: Callable[[], bool]) -> None:
    """Sleep in short naps until `done`: a wait inside the library would block Ctrl-C."""
    started = time.perf_counter()
    while not done():
        time.sleep(min(LONGEST_NAP_SECONDS, time.perf_counter() - started))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
