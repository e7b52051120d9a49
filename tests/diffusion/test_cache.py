import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from qzo_diffusion.core.errors import OutputError
from qzo_diffusion.diffusion.cache import TensorCache, _canonical

KEY: dict[str, str | int | float | bool] = {"file": "ab12", "width": 64, "flip": False}


def only_file(cache: TensorCache) -> Path:
    (path,) = cache.folder.iterdir()
    return path


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6, dtype=torch.float32).reshape(2, 3),
        torch.arange(6).reshape(2, 3).T,
        torch.tensor(3.5, dtype=torch.bfloat16),
        torch.zeros(0, 4, dtype=torch.float16),
        torch.zeros(3, dtype=torch.bool),
        torch.ones(1).expand(5),
    ],
    ids=["float32", "transposed", "bfloat16 scalar", "empty", "bool", "expanded"],
)
def test_what_was_put_comes_back(tmp_path: Path, tensor: torch.Tensor) -> None:
    cache = TensorCache(tmp_path / "deep" / "cache")
    assert cache.get(KEY) is None
    cache.put(KEY, {"a": tensor, "b": tensor})
    found = TensorCache(cache.folder).get(dict(reversed(list(KEY.items()))))
    assert found is not None
    assert set(found) == {"a", "b"}
    assert found["a"].dtype == tensor.dtype
    assert torch.equal(found["a"], tensor)


def test_the_file_is_plain_safetensors_that_names_its_key(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    cache.put(KEY, {"a": torch.ones(2)})
    path = only_file(cache)
    assert path.suffix == ".safetensors"
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["key"] == '{"file":"ab12","flip":false,"width":64}'
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(path.read_bytes())


@pytest.mark.parametrize(
    "change", [{"file": "ab13"}, {"width": 80}, {"flip": True}, {"flip": 0}, {"more": 1}]
)
def test_any_change_of_the_key_is_a_miss(
    tmp_path: Path, change: dict[str, str | int | bool]
) -> None:
    cache = TensorCache(tmp_path)
    cache.put(KEY, {"a": torch.ones(2)})
    assert cache.get({**KEY, **change}) is None


values = (
    st.text() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans()
)
keys = st.dictionaries(st.text(), values)


@given(keys, keys)
def test_different_keys_have_different_names(one: dict[str, str], two: dict[str, str]) -> None:
    same = one.keys() == two.keys() and all(repr(one[name]) == repr(two[name]) for name in one)
    assert (_canonical(one) == _canonical(two)) == same


def test_every_damaged_byte_is_a_miss_that_can_be_mended(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    cache.put(KEY, {"a": torch.arange(4, dtype=torch.float32)})
    path = only_file(cache)
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        found = cache.get(KEY)
        # A flipped bit may fall on padding or on nothing that matters; it must never give other
        # numbers.
        assert found is None or torch.equal(found["a"], torch.arange(4, dtype=torch.float32))
        assert path.exists() == (found is not None)
    cache.put(KEY, {"a": torch.ones(1)})
    assert cache.get(KEY) is not None


@pytest.mark.parametrize(
    "data", [b"", b"\x00", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0{}", b"no safetensors at all"]
)
def test_a_file_of_nonsense_is_removed(tmp_path: Path, data: bytes) -> None:
    cache = TensorCache(tmp_path)
    cache.put(KEY, {"a": torch.ones(2)})
    path = only_file(cache)
    path.write_bytes(data)
    assert cache.get(KEY) is None
    assert not path.exists()


def test_a_truncated_file_is_a_miss(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    cache.put(KEY, {"a": torch.ones(100)})
    path = only_file(cache)
    path.write_bytes(path.read_bytes()[:-1])
    assert cache.get(KEY) is None


def test_the_file_of_another_key_is_a_miss(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    cache.put(KEY, {"a": torch.ones(2)})
    path = only_file(cache)
    other = {**KEY, "flip": True}
    cache.put(other, {"a": torch.zeros(2)})
    (other_path,) = set(tmp_path.iterdir()) - {path}
    other_path.replace(path)
    assert cache.get(KEY) is None


def test_a_write_that_fails_leaves_the_old_entry_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = TensorCache(tmp_path)
    cache.put(KEY, {"a": torch.ones(2)})

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OutputError, match="No space left"):
        cache.put(KEY, {"a": torch.zeros(2)})
    assert torch.equal((cache.get(KEY) or {})["a"], torch.ones(2))
    only_file(cache)


def test_many_writers_at_once(tmp_path: Path) -> None:
    def write_and_read(index: int) -> bool:
        cache = TensorCache(tmp_path)
        cache.put(KEY, {"a": torch.full((1000,), float(index))})
        found = cache.get(KEY)
        return found is not None and len(found["a"].unique()) == 1

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(write_and_read, range(64)))
    only_file(TensorCache(tmp_path))


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = TensorCache(tmp_path / "file" / "cache")
    assert cache.get(KEY) is None
    with pytest.raises(OutputError, match="cannot write") as caught:
        cache.put(KEY, {"a": torch.ones(2)})
    assert str(tmp_path / "file") in caught.value.got
    assert caught.value.expected
    assert caught.value.remedy


def someone_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on this process belongs to another user than what it has written."""
    another = os.geteuid() + 1
    monkeypatch.setattr("os.geteuid", lambda: another)


def test_the_folder_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = TensorCache(tmp_path / "cache")
    cache.put(KEY, {"a": torch.ones(2)})
    someone_else(monkeypatch)
    for use in (cache.check, lambda: cache.get(KEY), lambda: cache.put(KEY, {})):
        with pytest.raises(OutputError, match="belongs to the user") as caught:
            use()
        assert "data.cache_dir" in caught.value.remedy


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_of_another_user_is_made_again(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path / "cache")
    cache.put(KEY, {"a": torch.ones(2)})
    os.chown(only_file(cache), 12345, 12345)
    assert cache.get(KEY) is None
    cache.put(KEY, {"a": torch.zeros(2)})
    assert torch.equal((cache.get(KEY) or {})["a"], torch.zeros(2))


def test_nobody_else_can_write_into_the_cache(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        cache = TensorCache(tmp_path / "deep" / "cache")
        cache.put(KEY, {"a": torch.ones(2)})
        assert cache.folder.stat().st_mode & 0o777 == 0o700
        cache.folder.chmod(0o777)  # as an old version may have left it
        assert cache.get(KEY) is not None
        assert cache.folder.stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_mode_that_the_umask_gives(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        cache = TensorCache(tmp_path)
        cache.put(KEY, {"a": torch.ones(2)})
    finally:
        os.umask(before)
    assert only_file(cache).stat().st_mode & 0o777 == 0o666 & ~mask


def test_an_entry_without_a_checksum_is_made_again(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    cache.put(KEY, {"a": torch.ones(2)})
    save_file({"a": torch.ones(2)}, only_file(cache), {"key": _canonical(KEY)})
    assert cache.get(KEY) is None
