"""No verb opens a connection, and ranks of one machine are reached from that machine alone."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from qzo_diffusion.train.distributed import join, leave, loopback_interface
from tests.conftest import write_squares
from tests.forked import MOST_SECONDS, end_all, started_ranks
from tests.tiny_llama import save_tiny_llama, write_sentences

# Every verb in one process; whatever a library tries to reach is written down, and ends there.
SCRIPT = """
import json, sys
reached = []

def audit(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        reached.append(str(arguments[1]))
        raise OSError(111, "no network here")
    if event == "socket.getaddrinfo":
        reached.append(str(arguments[0]))
        raise OSError(111, "no network here")

sys.addaudithook(audit)
import contextlib, socket
with contextlib.suppress(OSError):
    socket.create_connection(("127.0.0.1", 9))
assert len(reached) >= 1, "the hook does not see connections"
reached.clear()
from qzo_diffusion.cli import main
from qzo_diffusion.evaluate import signal
signal.DIRECTIONS, signal.REPEATS = 4, 1  # for speed
codes = [main(verb) for verb in json.load(open(sys.argv[1]))]
print(json.dumps({"codes": codes, "reached": reached}))
"""


def verbs(place, model):
    run, lm = str(place / "run"), str(place / "lm_run")
    prompts, images = str(place / "prompts.txt"), str(place / "imgs")
    fast = [f"data.cache_dir={place / 'cache'}", "data.batch_size=1", "sample.steps=1"]
    fast += ["sample.every=0", "train.validate_every=0", "compute.dtype=float32"]

    def out(name):
        return ["--output-dir", str(place / name)]

    task = ["--task", "sst2", "--data-dir", str(place / "data"), "--model", str(place / "lm")]
    few = ["data.train_examples=8", "data.validation_examples=4", "data.test_examples=4"]
    scored = ["evaluate", "--prompts", prompts]
    voted = ["vote", "--run", str(place / "voted")]
    train = ["train", "--model", model, "--style-dir", images, "--sample-prompts", prompts]
    subspace = ["subspace", "--model", model, "--max-steps", "1"]
    return [
        ["doctor"],
        ["validate", "--config", "demo.yaml"],
        [*train, "--caption", "a square", "--max-steps", "1", *out("run"), *fast],
        ["sample", "--run", run, "--prompts", prompts, *out("samples")],
        # its page is served, and nobody comes
        [*voted, "--model", model, "--prompts", prompts, "train.max_steps=0", *fast],
        ["mix", "--run", f"{run}=0.5", *out("mixed")],
        ["replay", "--journal", f"{run}/journal.qzo", "--model", model, *out("replayed")],
        [*scored, "--run", run, "--scorer", "embedded"],
        [*scored, "--images", str(place / "samples" / "samples"), "--scorer", "embedded"],
        ["evaluate", "--compare", run, run],
        ["report", "--run", run],
        [*subspace, "--prompts", prompts, "--styles", prompts, *out("directions"), *fast],
        *(
            ["export", "--run", run, "--format", kind, *out(kind)]
            for kind in ("nf4", "bf16", "delta", "journal", "native")
        ),
        ["llm", "train", *task, "--max-steps", "1", *out("lm_run"), "data.batch_size=4", *few],
        ["llm", "evaluate", *task, "--run", lm, *few],
        ["export", "--run", lm, "--format", "native", *out("lm_native")],
        # names of remote things that are not here: refused, and not fetched
        ["sample", "--model", "nobody/nothing", "--prompts", prompts, *out("no")],
        ["llm", "evaluate", "--task", "sst2", "--data-dir", "nobody/none", "--model", "no/lm"],
        [*scored, "--run", run, "--scorer", "ViT-B-32/openai"],
        [*scored, "--run", run, "--scorer", "ViT-B-16-SigLIP/webli"],
    ], 4


class Proxy:
    """Counts who connects to it."""

    def __init__(self):
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.connections = 0
        threading.Thread(target=self._count, daemon=True).start()

    def _count(self):
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            connection.close()

    def close(self):
        self._socket.close()


def test_every_verb_runs_without_a_connection(tmp_path, pipeline):
    write_squares(tmp_path / "imgs", [(90 * index, 0, 50) for index in range(2)])
    (tmp_path / "prompts.txt").write_text("red apple\n")
    save_tiny_llama(tmp_path / "lm")
    write_sentences(tmp_path / "data")
    wanted, refused = verbs(tmp_path, str(pipeline))
    (tmp_path / "verbs.json").write_text(json.dumps(wanted))
    environment = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    proxy = Proxy()
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_ENDPOINT"):
        environment |= {name: proxy.address, name.lower(): proxy.address}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "verbs.json")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    proxy.close()
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["reached"] == []
    assert proxy.connections == 0
    expected = [0] * (len(wanted) - refused) + [2] * refused
    assert found["codes"] == expected, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("address", "inside"),
    [("127.0.0.1", True), ("localhost", True), ("127.0.0.5", True), ("192.0.2.1", False)],
)
def test_only_ranks_of_one_machine_are_kept_on_it(address, inside):
    assert (loopback_interface(address) is not None) == inside


def tell_what_listens():
    """Joins the other rank; the first one prints the addresses that it listens on."""
    ranks = join(60)
    ranks.wait()
    if ranks.first:
        opened = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
        inodes = {os.readlink(file) for file in opened if file.is_symlink()}
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                    print(table, fields[1], flush=True)
    ranks.wait()
    leave()


@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="needs Linux")
def test_ranks_of_one_machine_listen_on_loopback_alone():
    processes = started_ranks([(tell_what_listens,)] * 2)
    try:
        code, said = processes[0].wait(MOST_SECONDS)
    finally:
        end_all(processes)
    assert code == 0, said
    listening = [line for line in said.splitlines() if line.startswith("tcp")]
    assert listening, said
    assert all(line.startswith("tcp 0100007F:") for line in listening), listening
