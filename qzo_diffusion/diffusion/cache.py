"""Cache tensors on disk that can be computed again: latents and prompt embeddings.

A file is named by the hash of everything that its content depends on. So nobody reads a stale
entry: its name is never asked for again. Each file is written under another name, synced and
renamed. So a reader sees all of a file or nothing, and several processes may write at once. A file
counts as absent if it is damaged or if another user wrote it. safetensors has no checksum of its
own, so the metadata holds one.
"""

import contextlib
import hashlib
import json
import os
import stat
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes

from qzo_diffusion.core.errors import OutputError

Key = Mapping[str, str | int | float | bool]


class TensorCache:
    """A folder of named tensors by key. The first `put` makes it; several processes may share it.

    Example:
        >>> cache = TensorCache(Path("/tmp/latents"))
        >>> cache.put({"file": "ab12", "flip": False}, {"latents": torch.zeros(16, 8, 8)})
        >>> cache.get({"flip": False, "file": "ab12"})["latents"].shape
        torch.Size([16, 8, 8])
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: Key) -> dict[str, torch.Tensor] | None:
        """Return the tensors stored under `key`, on the CPU.

        Return None if there are none, if another user wrote them, or if the file is damaged. A
        damaged file is removed.

        Raises:
            OutputError: as `check`.
        """
        path = self._path(key)
        self.check()
        try:
            with path.open("rb") as file:
                if not _is_ours(os.fstat(file.fileno())):
                    return None
                data = file.read()
        except OSError:
            return None
        tensors = _decode(data, _canonical(key))
        if tensors is None:
            with contextlib.suppress(OSError):
                path.unlink()
        return tensors

    def put(self, key: Key, tensors: Mapping[str, torch.Tensor]) -> None:
        """Store tensors of any device and layout under `key`, and replace earlier ones.

        Raises:
            OutputError: the folder cannot be made or written, or belongs to another user.
        """
        path = self._path(key)
        data = _encode(tensors, _canonical(key))
        aside = self.folder / f".{path.stem}.{uuid.uuid4().hex}.tmp"
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o700, exist_ok=True)
            self.check()
            try:
                _write_synced(aside, data)
                os.replace(aside, path)
            finally:
                aside.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot write {path}: {error.strerror or error}",
                f"a folder for the cache that can be written, with {len(data)} bytes free",
                "free space, correct the permissions, or choose another: data.cache_dir=FOLDER",
            ) from error

    def check(self) -> None:
        """Make the folder readable by its owner alone, if it exists.

        Raises:
            OutputError: it belongs to another user, whose files could be anything.
        """
        try:
            facts = self.folder.stat()
        except OSError:
            return  # made on the first `put`
        if not _is_ours(facts):
            raise OutputError(
                f"the cache {self.folder} belongs to the user with the id {facts.st_uid}",
                "a folder of your own, since the files in it are trusted",
                "choose one: data.cache_dir=FOLDER",
            )
        if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            with contextlib.suppress(OSError):
                self.folder.chmod(0o700)

    def _path(self, key: Key) -> Path:
        name = hashlib.blake2b(_canonical(key).encode("ascii"), digest_size=20).hexdigest()
        return self.folder / f"{name}.safetensors"


def _is_ours(facts: os.stat_result) -> bool:
    return not hasattr(os, "geteuid") or facts.st_uid == os.geteuid()  # Windows has no such ids


def _canonical(key: Key) -> str:
    """Return the key as JSON that does not depend on the order of its entries."""
    return json.dumps(
        dict(key), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _encode(tensors: Mapping[str, torch.Tensor], key: str) -> bytes:
    # clone: safetensors refuses tensors that share memory.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return tensors_to_bytes(plain, metadata={"key": key, "checksum": _checksum(plain)})


def _decode(data: bytes, key: str) -> dict[str, torch.Tensor] | None:
    try:
        header_size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + header_size])["__metadata__"]
        tensors = tensors_from_bytes(data)
        intact = metadata["key"] == key and metadata["checksum"] == _checksum(tensors)
    except Exception:
        # Damaged bytes may fail anywhere in two parsers. The entry is then computed again.
        return None
    return tensors if intact else None


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=20)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
