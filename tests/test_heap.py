"""Freed blocks go back to the system, also those between small ones that stay."""

import subprocess
import sys

import pytest

CHURN = """
import sys
from pathlib import Path
from qzo_diffusion.system.heap import give_back

freed = b"x" * 30_000_000
del freed  # raises the limit
large = [b"x" * 5_000_000 for _ in range(20)]
small = []
for place in range(20):
    small.append(b"x" * 100_000)
    large.append(b"x" * 5_000_000)
large.clear()
if sys.argv[1] == "given back" and not give_back():
    sys.exit("no such call")
status = Path("/proc/self/status").read_text()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))
"""


def resident(kind: str) -> int:
    """KB that stay resident after 200 MB of blocks were freed between others of 100 KB."""
    command = [sys.executable, "-c", CHURN, kind]
    done = subprocess.run(command, capture_output=True, text=True)
    if "no such call" in done.stderr:
        pytest.skip("this C library has no such call")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and malloc_trim is Linux's")
def test_blocks_between_small_ones_are_given_back() -> None:
    assert resident("given back") < resident("as it is") - 50_000
