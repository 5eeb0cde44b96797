"""Writing safetensors shards as a stream: planned sizes, one row at a time, whole or not at all.

``safetensors.torch.save_file`` wants every tensor of a file in memory. Here the header is written
first, from the plan, and each tensor (or one expert of it) goes to its place when it is ready.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from samoyeds_hf.errors import CheckpointError
from samoyeds_hf.stored import DTYPES, INDEX_FILE, SINGLE_FILE

_NAME_OF_DTYPE = {dtype: name for name, dtype in DTYPES.items()}
TEMPORARY = ".tmp"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ShardSpec:
    """A file that will be written."""

    file: str
    tensors: tuple[TensorSpec, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the data, without the header."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    def header(self) -> tuple[bytes, dict[str, int]]:
        """The file's first bytes, and the offset of each tensor from the start of the file."""
        # Wide elements first, as the library does it, so that every tensor is aligned.
        ordered = sorted(self.tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offsets, position = {}, 0
        for tensor in ordered:
            offsets[tensor.name] = position
            entries[tensor.name] = {
                "dtype": _NAME_OF_DTYPE[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [position, position + tensor.num_bytes],
            }
            position += tensor.num_bytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        head = len(text).to_bytes(8, "little") + text
        return head, {name: start + offset for name, offset in offsets.items()}


def plan_shards(
    groups: Sequence[Sequence[TensorSpec]],
    max_bytes: int,
    breaks: Container[int] = (),
) -> list[ShardSpec]:
    """Fill shards in order; a group (the parts of one weight) stays together, however large.

    Groups whose positions are in ``breaks`` begin a shard of their own.
    """
    shards: list[list[TensorSpec]] = [[]]
    room = max_bytes
    for position, group in enumerate(groups):
        size = sum(tensor.num_bytes for tensor in group)
        if (size > room or position in breaks) and shards[-1]:
            shards.append([])
            room = max_bytes
        shards[-1].extend(group)
        room -= size
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    if count == 1:
        names = [SINGLE_FILE]
    return [ShardSpec(name, tuple(shard)) for name, shard in zip(names, shards, strict=True)]


class ShardWriter:
    """Context that writes one shard under a temporary name and renames it when all is there.

    Raises:
        CheckpointError: the disk is full or not writable, or a tensor was not written whole.
    """

    def __init__(self, directory: Path, shard: ShardSpec) -> None:
        self.path = directory / shard.file
        self.temporary = self.path.with_name(shard.file + TEMPORARY)
        self.specs = {tensor.name: tensor for tensor in shard.tensors}
        self._head, self._offsets = shard.header()
        self._left = {tensor.name: tensor.num_bytes for tensor in shard.tensors}
        self._num_bytes = len(self._head) + shard.num_bytes

    def __enter__(self) -> ShardWriter:
        with disk_errors(self.temporary):
            self._file = os.open(self.temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            with disk_errors(self.temporary):
                _reserve(self._file, self._num_bytes)
                _write_all(self._file, self._head, 0)
        except BaseException:
            self._abandon()
            raise
        return self

    def write(self, name: str, tensor: torch.Tensor, row: int | None = None) -> None:
        """Write all of a tensor, or ``tensor`` as row ``row`` of its first dimension."""
        spec = self.specs[name]
        shape = spec.shape if row is None else spec.shape[1:]
        if tuple(tensor.shape) != shape or tensor.dtype != spec.dtype:
            raise CheckpointError(
                f"{name} was planned as {spec.dtype} {list(shape)}, found {tensor.dtype} "
                f"{list(tensor.shape)}; the source changed while it was read."
            )
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        offset = self._offsets[name] + (row or 0) * data.nbytes
        with disk_errors(self.temporary):
            _write_all(self._file, data.numpy(), offset)
        self._left[name] -= data.nbytes

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._abandon()
            return
        unfinished = [name for name, left in self._left.items() if left]
        if unfinished:
            self._abandon()
            raise CheckpointError(f"{unfinished[0]} must be written whole, found a part missing.")
        try:
            with disk_errors(self.temporary):
                os.fsync(self._file)
                os.replace(self.temporary, self.path)
        except BaseException:
            self._abandon()
            raise
        os.close(self._file)
        sync_directory(self.path.parent)

    def _abandon(self) -> None:
        os.close(self._file)
        self.temporary.unlink(missing_ok=True)


def write_index(directory: Path, shards: Sequence[ShardSpec]) -> None:
    """The index of a sharded checkpoint; a single file has none."""
    if len(shards) == 1:
        return
    weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    content = {
        "metadata": {"total_size": sum(shard.num_bytes for shard in shards)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_text(directory / INDEX_FILE, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step."""
    temporary = path.with_name(path.name + TEMPORARY)
    with disk_errors(path):
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def sync_directory(directory: Path) -> None:
    """Make renames in a directory durable."""
    sync_file(directory)


def sync_file(path: Path) -> None:
    """Make a file's contents durable."""
    with disk_errors(path):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a sentence about ``path``."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path} must be writable on a disk with room for it, found "
            f"{error.strerror or error}; free space or choose another place (a conversion "
            "continues with --resume)."
        ) from error


def _reserve(file: int, num_bytes: int) -> None:
    """Claim the space at once, so that a full disk shows before hours of work."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, num_bytes)
    else:
        os.truncate(file, num_bytes)


def _write_all(file: int, data: Any, offset: int) -> None:
    view = memoryview(data)
    while view.nbytes:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
