"""What tests of calibrated conversions share: three layers on disk, a text, a finished output."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from calibrated import SHARD_SIZE, calibrated, save_source, write_text
from checkpoints import convert, files_in
from tiny_models import MIXTRAL, Family

from samoyeds_hf.pruning import layer

# Three layers: one that is interrupted lies between two others.
THREE = Family(
    "three", "Mixtral", {**MIXTRAL.settings, "num_hidden_layers": 3, "num_local_experts": 2}
)


@pytest.fixture(scope="module")
def still() -> Iterator[None]:
    """Reports hold the time that pruning took; without it files can be compared byte for byte.

    No test here ends the machine, so that nothing waits for the disk; calls are made all the same.
    """
    with pytest.MonkeyPatch.context() as context:
        context.setattr(layer, "time", SimpleNamespace(perf_counter=lambda: 0.0))
        context.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "letters.txt")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers on disk; nobody changes them."""
    return save_source(THREE, tmp_path_factory.mktemp("source") / "dense")


@pytest.fixture
def own(source: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(source, tmp_path / "own"))


@pytest.fixture(scope="module")
def finished(
    source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """All files of an uninterrupted conversion to a directory called "out"."""
    path = tmp_path_factory.mktemp("whole") / "out"
    convert(source, path, calibrated(text), shard_size=SHARD_SIZE)
    return files_in(path) or {}
