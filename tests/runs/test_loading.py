"""The 4-bit copy on disk: hit only when nothing changed, never used when torn, and the same bits
either way.
"""

import os
import shutil
import signal

import pytest
import torch

from qzo_diffusion import devices
from qzo_diffusion.core.errors import ConfigError, OutputError
from qzo_diffusion.diffusion.transformer import empty_transformer, find_transformer
from qzo_diffusion.quant.stream import Quantization
from qzo_diffusion.runs import loading
from tests.forked import ended
from tests.killed_writing import kill_while_writing
from tests.small_models import sd3_transformer

SKIP = ("pos_embed", "proj_out")


@pytest.fixture
def folder(tmp_path):
    sd3_transformer(layers=2).save_pretrained(tmp_path / "transformer", max_shard_size="200KB")
    return tmp_path / "transformer"


def source_of(folder):
    found = find_transformer(folder)
    return loading.Source(found.entries, lambda: empty_transformer(found.config))


@pytest.fixture
def load(tmp_path, folder, monkeypatch):
    """Loads with a copy in tmp_path/copies. Says what was read: the files whose tensors were asked
    for.
    """
    read: set[str] = set()
    plain_fill = loading.fill_

    def fill(model, entries, *args, **options):
        read.update(span.file.parent.name for entry in entries.values() for span in entry.spans)
        return plain_fill(model, entries, *args, **options)

    monkeypatch.setattr(loading, "fill_", fill)

    def call(how=None, dtype=torch.float32):
        read.clear()
        model = loading.load_quantized(
            source_of(folder),
            how or Quantization(skip=SKIP),
            dtype=dtype,
            device=torch.device("cpu"),
            cache=tmp_path / "copies",
            smallest_cached=0,
        )
        return model.state_dict(), "source" if read == {"transformer"} else "copy"

    return call


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def copies(tmp_path):
    return [path for path in (tmp_path / "copies").iterdir() if not path.name.startswith(".")]


def test_the_second_start_reads_the_copy_and_gets_the_same_bits(load, tmp_path):
    first, where = load()
    assert where == "source"
    second, where = load()
    assert where == "copy"
    assert same(first, second)
    assert len(copies(tmp_path)) == 1


@pytest.mark.parametrize("changed", ["blocksize", "skip", "dtype", "mtime", "header"])
def test_whatever_the_numbers_depend_on_makes_another_copy(load, folder, changed):
    load()
    how, dtype = Quantization(skip=SKIP), torch.float32
    if changed == "blocksize":
        how = Quantization(skip=SKIP, blocksize=128)
    elif changed == "skip":
        how = Quantization(skip=(*SKIP, "norm1"))
    elif changed == "dtype":
        dtype = torch.bfloat16
    elif changed == "mtime":
        os.utime(next(folder.glob("*.safetensors")), ns=(1, 1))
    else:
        file = next(folder.glob("*.safetensors"))
        status, data = file.stat(), file.read_bytes()
        file.write_bytes(data.replace(b'"format":"pt"', b'"format":"tp"'))
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert load(how, dtype)[1] == "source"
    assert load(how, dtype)[1] == "copy"


@pytest.mark.parametrize("damage", ["no marker", "cut off", "no header", "no file"])
def test_a_torn_copy_is_made_again(load, tmp_path, damage, capsys):
    first, _ = load()
    (copy,) = copies(tmp_path)
    file = copy / loading.WEIGHTS
    if damage == "no marker":
        (copy / "COMPLETE").unlink()
    elif damage == "cut off":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "no header":
        file.write_bytes(b"")
    else:
        file.unlink()
    again, where = load()
    assert where == "source"
    assert same(first, again)
    assert load()[1] == "copy"


@pytest.mark.parametrize("place", [0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("name", [loading.WEIGHTS, loading.SOURCE, "COMPLETE"])
def test_a_byte_that_flips_in_a_copy_is_noticed(load, tmp_path, place, name, capsys):
    first, _ = load()
    (copy,) = copies(tmp_path)
    data = bytearray((copy / name).read_bytes())
    data[int(place * len(data))] ^= 1
    (copy / name).write_bytes(data)
    capsys.readouterr()
    assert same(first, load()[0])
    if name == loading.WEIGHTS:
        assert "made again" in capsys.readouterr().err
    assert same(load()[0], first)
    assert load()[1] == "copy"


def test_a_flipped_byte_in_a_header_is_noticed(load, tmp_path):
    first, _ = load()
    (copy,) = copies(tmp_path)
    data = (copy / loading.WEIGHTS).read_bytes()
    assert b'"dtype":"F32"' in data
    (copy / loading.WEIGHTS).write_bytes(data.replace(b'"dtype":"F32"', b'"dtype":"I32"', 1))
    again, where = load()
    assert (where, same(first, again)) == ("source", True)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="owners are POSIX's")
@pytest.mark.parametrize("fault", ["another owner", "anybody may write the copy", "the folder"])
def test_a_copy_that_others_can_write_is_not_used(load, tmp_path, monkeypatch, fault, capsys):
    first, _ = load()
    (copy,) = copies(tmp_path)
    folder = copy.parent
    assert [path.stat().st_mode & 0o77 for path in (folder, copy)] == [0, 0]
    if fault == "another owner":
        user = os.getuid()
        monkeypatch.setattr(loading.os, "getuid", lambda: user + 1)
    elif fault == "the folder":
        folder.chmod(0o777)
    else:
        (copy / loading.WEIGHTS).chmod(0o666)
    again, where = load()
    assert (where, same(first, again)) == ("source", True)
    assert "others can write" in capsys.readouterr().err


def test_a_copy_that_cannot_be_written_is_told_and_the_model_is_there(
    load, tmp_path, monkeypatch, capsys
):
    def full(*args):
        raise OutputError("no room", "room", "make room")

    monkeypatch.setattr(loading, "write_folder", full)
    state, _ = load()
    assert state
    assert "no 4-bit copy is stored" in capsys.readouterr().err
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        "qzo_diffusion.system.files.shutil.disk_usage", lambda path: usage._replace(free=1000)
    )
    load()
    assert "GB free" in capsys.readouterr().err


def test_small_models_leave_no_copy(folder, tmp_path):
    options = {"dtype": torch.float32, "device": torch.device("cpu"), "cache": tmp_path / "copies"}
    loading.load_quantized(source_of(folder), Quantization(skip=SKIP), **options)
    assert not (tmp_path / "copies").exists()


def load_and_die(folder, cache):
    kill_while_writing(loading, 40)
    options = {"dtype": torch.float32, "device": torch.device("cpu"), "cache": cache}
    loading.load_quantized(source_of(folder), Quantization(skip=SKIP), **options, smallest_cached=0)


def test_a_kill_in_the_middle_of_writing_leaves_nothing_that_is_used(load, folder, tmp_path):
    code, said = ended(load_and_die, folder, tmp_path / "copies")
    assert code == -signal.SIGKILL, said
    assert copies(tmp_path) == []
    assert list((tmp_path / "copies").iterdir()) != []  # what it left aside
    assert load()[1] == "source"
    assert load()[1] == "copy"
    assert list((tmp_path / "copies").iterdir()) == copies(tmp_path)


@pytest.mark.parametrize("name", ["meta", "mps", "xla:0", "nonsense"])
def test_devices_that_nothing_here_was_made_for_are_refused(name):
    with pytest.raises(ConfigError, match="auto, cpu, cuda, xpu or mps"):
        devices.choose_device(name)
