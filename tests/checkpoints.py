"""Checkpoints on disk: make them, edit them, compare them byte for byte."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import PATTERN, Family
from transformers import AutoModelForCausalLM, PreTrainedModel

import samoyeds_hf
from samoyeds_hf import PatchReport, SamoyedsConfig
from samoyeds_hf.convert import convert_checkpoint
from samoyeds_hf.errors import SamoyedsError

CONFIG = SamoyedsConfig(PATTERN)
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]


class Stored(NamedTuple):
    """Where a tensor lies in a file, from the file's own header."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # from the beginning of the file
    stop: int

    @property
    def data(self) -> bytes:
        return self.file.read_bytes()[self.start : self.stop]


def headers(directory: Path) -> dict[str, Stored]:
    """Every tensor of a directory, read without any library."""
    found: dict[str, Stored] = {}
    for file in sorted(directory.glob("*.safetensors")):
        data = file.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        for name, entry in json.loads(data[8 : 8 + size]).items():
            if name != "__metadata__":
                assert name not in found, f"{name} is stored twice"
                start, stop = (8 + size + offset for offset in entry["data_offsets"])
                found[name] = Stored(file, entry["dtype"], tuple(entry["shape"]), start, stop)
    return found


def contents(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor, whatever file it is in."""
    return {name: (t.dtype, t.shape, t.data) for name, t in headers(directory).items()}


def files_in(directory: Path) -> dict[str, bytes] | None:
    """Every file below a directory; None where there is no directory."""
    if not directory.exists():
        return None
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def save_dense(
    family: Family, directory: Path, dtype: torch.dtype = torch.bfloat16, **settings: Any
) -> Path:
    """A family's dense model, saved as transformers does it."""
    family.make(dtype).save_pretrained(directory, **settings)
    return directory


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON object; None removes one."""
    content = {**json.loads(path.read_text()), **changes}
    kept = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(kept))


def edit_tensors(directory: Path, edit: Callable[[Tensors], object]) -> None:
    """Change the tensors of a checkpoint in one file."""
    tensors = load_file(directory / SINGLE)
    edit(tensors)
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})


def poke(directory: Path, name: str, place: tuple[int, ...], value: bytes) -> None:
    """Overwrite one element of a stored tensor in its file."""
    stored = headers(directory)[name]
    offset = 0
    for size, position in zip(stored.shape, place, strict=True):
        offset = offset * size + position
    with stored.file.open("r+b") as file:
        file.seek(stored.start + offset * len(value))
        file.write(value)


def load(directory: Path, **settings: Any) -> PreTrainedModel:
    """From a directory, in eval mode, its tensors where a fresh model has them."""
    model = AutoModelForCausalLM.from_pretrained(directory, **settings).eval()
    # NOTE: a file's tensors lie at multiples of 8 bytes, and the CPU's matrix products round
    # otherwise at such places than at multiples of 64, dense ones too.
    for parameter in model.parameters():
        if not parameter.is_meta:
            parameter.data = parameter.data.clone()
    return model


def load_as_auto(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()


def convert(
    source: Path, destination: Path, config: SamoyedsConfig = CONFIG, **settings: Any
) -> PatchReport:
    return convert_checkpoint(source, destination, config, **{"progress": False, **settings})


def patched(source: Path, destination: Path, config: SamoyedsConfig = CONFIG) -> PatchReport:
    """What the converter must make: load everything, patch it, save it."""
    model = load_as_auto(source)
    report = samoyeds_hf.patch_model(model, config=config)
    model.save_pretrained(destination)
    return report


def assert_same_checkpoint(found: Path, expected: Path) -> None:
    """Names, dtypes, shapes, bytes and configuration."""
    left, right = contents(found), contents(expected)
    assert sorted(left) == sorted(right)
    assert [name for name in left if left[name] != right[name]] == []
    left, right = (json.loads((path / "config.json").read_text()) for path in (found, expected))
    assert left == right


def refused(
    error: type[SamoyedsError], *parts: str, call: Callable[[], object], kept: Path | None = None
) -> str:
    """Run ``call``: it must raise one sentence with all parts, and leave ``kept`` as it was."""
    before = files_in(kept) if kept else None
    with pytest.raises(error) as info:
        call()
    message = str(info.value)
    for part in parts:
        assert part in message
    assert "\n" not in message
    if kept:
        assert files_in(kept) == before
    return message
