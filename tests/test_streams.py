"""Output that can't be encoded, and readers that go away."""

import os
import subprocess
import sys

import pytest

from qzo_diffusion.core.errors import OutputError
from qzo_diffusion.system.streams import Sink

CONFIG = 'model: tiny\ndata:\n  style_dir: imgs\n  caption: "ein Bär 🐻"\n'


def qzo(tmp_path, *arguments, shell="", **environment):
    (tmp_path / "c.yaml").write_text(CONFIG, encoding="utf-8")
    code = "import sys; from qzo_diffusion.cli import main; sys.exit(main(sys.argv[1:]))"
    command = ["bash", "-c", f'exec "$@" {shell}', "bash", sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, capture_output=True, cwd=tmp_path, env=os.environ | environment, timeout=100
    )


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "cp1252:strict"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
)
def test_what_the_encoding_lacks_becomes_an_escape(tmp_path, environment):
    done = qzo(tmp_path, "validate", "--config", "c.yaml", **environment)
    assert done.returncode == 0, done.stderr
    assert b"\\U0001f43b" in done.stdout
    assert not done.stderr


def test_utf8_stays_as_it_is(tmp_path):
    done = qzo(tmp_path, "validate", "--config", "c.yaml", PYTHONIOENCODING="utf-8")
    assert "ein Bär 🐻" in done.stdout.decode()


@pytest.mark.parametrize("arguments", [["validate", "--config", "c.yaml"], ["--help"]])
@pytest.mark.parametrize("shell", ["> >(:)", "2> >(:) > >(:)", ">&-", "2>&-", ">&- 2>&- <&-"])
def test_nobody_reads(tmp_path, arguments, shell):
    done = qzo(tmp_path, *arguments, shell=shell)
    assert (done.returncode, done.stderr) == (0, b"")


def test_an_error_that_nobody_reads_is_one_all_the_same(tmp_path):
    done = qzo(tmp_path, "validate", "--config", "none.yaml", shell="2>&-")
    assert (done.returncode, done.stderr, done.stdout) == (2, b"", b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_told_once(tmp_path):
    done = qzo(tmp_path, "validate", "--config", "c.yaml", shell="> /dev/full")
    assert done.returncode == 2
    assert b"results can't be written" in done.stderr
    assert b"Traceback" not in done.stderr
    assert b"Exception" not in done.stderr


def test_a_sink_drops_what_comes_after_its_reader():
    reader, writer = os.pipe()
    sink = Sink(writer, needed=True)
    assert sink.write(b"one") == 3
    os.close(reader)
    assert sink.write(b"two") == 3
    os.close(writer)
    assert sink.write(b"three") == 5


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_progress_is_not_worth_an_error():
    full = os.open("/dev/full", os.O_WRONLY)
    assert Sink(full, needed=False).write(b"one") == 3
    with pytest.raises(OutputError):
        Sink(full, needed=True).write(b"one")
    os.close(full)
