"""Tensors in the safetensors files of a model directory, known by their headers.

A file is opened for one tensor at a time, because what is read of a mapped file counts as memory
used until it is unmapped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from samoyeds_hf.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not loaded."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize

    def load(self) -> torch.Tensor:
        """All of it, on the CPU; the file's pages stay mapped as long as the tensor lives."""
        with _open(self.file) as handle:
            tensor: torch.Tensor = handle.get_tensor(self.name)
            return tensor

    def load_row(self, position: int) -> torch.Tensor:
        """``tensor[position:position + 1]``, reading no more than that."""
        with _open(self.file) as handle:
            tensor: torch.Tensor = handle.get_slice(self.name)[position : position + 1]
            return tensor

    def on_meta(self) -> torch.Tensor:
        """Its shape and dtype, for dry runs."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Every tensor of some safetensors files, by name.

    Raises:
        CheckpointError: a file is missing, truncated or not safetensors, or a dtype is unknown.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        with _open(file) as handle:
            for name in handle.keys():  # noqa: SIM118  (no mapping)
                view = handle.get_slice(name)
                dtype = torch_dtype(name, view.get_dtype(), file)
                tensors[name] = StoredTensor(name, file, dtype, tuple(view.get_shape()))
    return tensors


def torch_dtype(name: str, found: str, file: Path) -> torch.dtype:
    """The dtype that a header calls ``found``.

    Raises:
        CheckpointError: an unknown one.
    """
    if found not in DTYPES:
        raise CheckpointError(
            f"{name} must have a known dtype, found {found} in {file}; dequantise the checkpoint "
            "first."
        )
    return DTYPES[found]


def checkpoint_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory.

    Raises:
        CheckpointError: no directory, no safetensors, or a shard that the index names is missing.
    """
    if not directory.is_dir():
        raise CheckpointError(f"A checkpoint must be a directory, found none at {directory}.")
    index = directory / INDEX_FILE
    if index.is_file():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{index} must be a JSON object with a weight_map, found {error!r}; copy it again."
            ) from error
        files = [directory / name for name in names]
        if missing := [file.name for file in files if not file.is_file()]:
            raise CheckpointError(
                f"All {len(files)} shards of {directory} must be there, found {missing[0]} missing "
                f"({len(missing)} in all); download it again."
            )
        return files
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    raise CheckpointError(
        f"A checkpoint needs {SINGLE_FILE} or {INDEX_FILE}, found neither in {directory}; save it "
        "with save_pretrained first if it is in another format."
    )


def read_checkpoint(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model directory, checked against its index.

    Raises:
        CheckpointError: see :func:`checkpoint_files` and :func:`read_headers`; or the index names
            a tensor that its shard does not hold.
    """
    tensors = read_headers(checkpoint_files(directory))
    index = directory / INDEX_FILE
    if index.is_file():
        for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            if name not in tensors or tensors[name].file.name != file:
                raise CheckpointError(
                    f"{file} must hold {name}, found it without; the shard and the index do not "
                    "belong together, download them again."
                )
    return tensors


def first_floating_dtype(tensors: Sequence[StoredTensor]) -> torch.dtype:
    """What ``dtype="auto"`` takes where the configuration names none."""
    return next((t.dtype for t in tensors if t.dtype.is_floating_point), torch.float32)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file} must be there, found it missing; download it again."
        ) from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} must be a whole safetensors file, found {file.stat().st_size} bytes that are "
            f"not ({error}); download it again."
        ) from error
