"""One writer a file, by whatever locks the system has."""

import errno
import os
from types import SimpleNamespace

import pytest

from qzo_diffusion.core import locks


@pytest.fixture
def opened(tmp_path):
    """Opens the same file again and again."""
    (tmp_path / "file").write_bytes(b"content")
    descriptors = []

    def again():
        descriptors.append(os.open(tmp_path / "file", os.O_RDWR))
        return descriptors[-1]

    yield again
    for descriptor in descriptors:
        os.close(descriptor)


def test_a_writer_keeps_others_out_and_readers_share(opened):
    locks.lock(opened(), shared=True)
    locks.lock(opened(), shared=True)
    with pytest.raises(BlockingIOError):
        locks.lock(opened())


def test_windows_locks_a_byte_that_nobody_reads(opened, monkeypatch):
    taken = []

    def locking(descriptor, kind, count):
        place = os.lseek(descriptor, 0, os.SEEK_CUR)
        if (kind, place) in taken:
            raise PermissionError(errno.EACCES, "Permission denied")
        taken.append((kind, place))

    monkeypatch.setattr(locks, "fcntl", None)
    monkeypatch.setattr(locks, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    first, second = opened(), opened()
    os.lseek(first, 3, os.SEEK_SET)
    locks.lock(first)
    assert os.lseek(first, 0, os.SEEK_CUR) == 3
    assert taken[0][1] > 2**32
    with pytest.raises(BlockingIOError):
        locks.lock(second)
    assert os.lseek(second, 0, os.SEEK_CUR) == 0


def test_without_locks_nobody_is_kept_out(opened, monkeypatch):
    monkeypatch.setattr(locks, "fcntl", None)
    monkeypatch.setattr(locks, "msvcrt", None)
    locks.lock(opened())
    locks.lock(opened())
