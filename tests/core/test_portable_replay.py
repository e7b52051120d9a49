"""A journal gives the same bits on another number of threads, in another process and with other
vector instructions.
"""

import json

import pytest

from qzo_diffusion.core.journal import read_journal
from tests.core.replay_worker import hashes, write_journal
from tests.started import kill_all, start

# threads and ATEN_CPU_CAPABILITY; this process has one thread and what the machine can do
PLACES = [("1", "default"), ("4", "avx2")]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What the processes found, and what this one finds, for one direction a step and for three."""
    files = [tmp_path_factory.mktemp("journals") / f"{directions}.qzo" for directions in (1, 3)]
    for file, directions in zip(files, (1, 3), strict=True):
        write_journal(file, directions)
    processes = []
    for threads, capability in PLACES:
        environment = {"OMP_NUM_THREADS": threads, "ATEN_CPU_CAPABILITY": capability}
        processes.append(start(["-m", "tests.core.replay_worker", *map(str, files)], **environment))
    try:
        outputs = [process.communicate(timeout=90) for process in processes]
    finally:
        kill_all(processes)
    assert [process.returncode for process in processes] == [0] * len(PLACES), outputs
    found = [json.loads(output) for output, _ in outputs]
    return [{file.stem: one[str(file)] for file in files} | one for one in found], {
        f.stem: hashes(read_journal(f)) for f in files
    }


def test_the_processes_differ_as_they_should(told):
    assert [facts["threads"] for facts in told[0]] == [int(threads) for threads, _ in PLACES]
    assert told[0][0]["capability"] == "DEFAULT"


@pytest.mark.parametrize("directions", ["1", "3"])
@pytest.mark.parametrize("place", range(len(PLACES)))
def test_replay_gives_the_same_bits_everywhere(told, place, directions):
    assert told[0][place][directions] == told[1][directions]


def test_no_two_cases_give_the_same(told):
    """Or equal hashes would say nothing."""
    every = [value for found in told[1].values() for value in found.values()]
    assert len(set(every)) >= len(every) - 6 * 2  # numbers of dense cases are the scales
