"""A model directory that appears whole or not at all.

Work goes on in ``DST.partial``; one rename makes it DST. A checkpoint that is replaced is called
``DST.replaced`` from the moment before that rename until it is deleted.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from samoyeds_hf.errors import CheckpointError
from samoyeds_hf.shards import disk_errors, sync_directory, sync_file

REPORT_FILE = "samoyeds_report.json"
DISTILLATION_KEY = "distillation"  # in it, beside what a PatchReport holds
STATE_FILE = "conversion.json"
_LOCK_FILE = ".lock"
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf"}
_LOGS = ("samoyeds_block.csv", "samoyeds_distillation.csv")
_OWN_FILES = {"config.json", "README.md", REPORT_FILE, STATE_FILE, *_LOGS}
_CHAT_TEMPLATES = "additional_chat_templates"  # the one directory that belongs to a tokenizer


def partial_of(destination: Path) -> Path:
    """Where a destination grows: beside it, or beside what it links to."""
    return _beside(destination, ".partial")


def pruned_of(destination: Path) -> Path:
    """Where a checkpoint waits that is pruned and still to be distilled."""
    return _beside(destination, ".pruned")


def check_destination(source: Path, destination: Path, overwrite: bool) -> None:
    """Refuse to write over anything but a checkpoint that the user gave up.

    Raises:
        CheckpointError: the destination exists, is no checkpoint, or holds the source.
    """
    source, destination = source.resolve(), destination.resolve()
    if source in (partial_of(destination), _replaced_of(destination)):
        raise CheckpointError(
            f"The source must not be a working directory of the destination, found {source} for "
            f"{destination}; choose another destination."
        )
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    if not overwrite:
        raise CheckpointError(
            f"The destination must be new, found {destination}; choose another one, or replace it "
            "with --overwrite."
        )
    if not (destination / "config.json").is_file():
        raise CheckpointError(
            f"--overwrite replaces checkpoints only, found no config.json in {destination}; choose "
            "another destination."
        )
    if source.is_relative_to(destination):
        raise CheckpointError(
            f"The destination must not hold the source, found {source} in {destination}; choose "
            "another destination."
        )
    if (replaced := _replaced_of(destination)).exists():
        raise CheckpointError(
            f"The checkpoint in {destination} is set aside as {replaced} when it is replaced, "
            "found that this exists; delete or move it."
        )


@contextmanager
def growing_directory(
    source: Path, destination: Path, *, resume: bool | None, overwrite: bool
) -> Iterator[Path]:
    """``DST.partial``, locked; it becomes DST by one rename if the block ends without an error.

    After an error it stays, for ``resume``. Work that cannot be continued passes None there: what
    is left of an earlier run is then of no use, and deleted.

    Raises:
        CheckpointError: see :func:`check_destination`; or a half-written directory is there and
            neither resume nor overwrite was asked for, or another process writes to it.
    """
    destination = destination.resolve()
    partial, replaced = partial_of(destination), _replaced_of(destination)
    check_destination(source, destination, overwrite)
    if partial.exists():
        _check_partial(partial, destination, allowed=resume is not False or overwrite)
        if replaced.exists() and not destination.exists():
            with disk_errors(destination):
                replaced.rename(destination)  # a run ended between the two renames
            check_destination(source, destination, overwrite)
    with disk_errors(partial):
        partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial):
        if not resume:
            _clear(partial)
        yield partial
        check_destination(source, destination, overwrite)  # much time has passed
        _put_in_place(partial, destination)


def copy_companions(source: Path, directory: Path) -> None:
    """Tokenizer, chat templates, generation config, licence: all files but weights and code."""
    for path in sorted(source.iterdir()):
        name = path.name
        with disk_errors(directory / name):
            if path.is_dir() and name == _CHAT_TEMPLATES:
                shutil.copytree(path, directory / name, dirs_exist_ok=True)
            if (
                path.is_file()
                and path.suffix not in _WEIGHT_SUFFIXES
                and not name.endswith((".index.json", ".py"))
                and not name.startswith(".")
                and name not in _OWN_FILES
            ):
                shutil.copyfile(path, directory / name)


def _beside(destination: Path, suffix: str) -> Path:
    destination = destination.resolve()
    return destination.with_name(destination.name + suffix)


def _replaced_of(destination: Path) -> Path:
    return _beside(destination, ".replaced")


def _check_partial(partial: Path, destination: Path, allowed: bool) -> None:
    """Refuse a half-written directory that was not asked for, and one that is somebody else's."""
    if not allowed:
        raise CheckpointError(
            f"{destination} must not be half written, found {partial}; continue with --resume, "
            "or start again with --overwrite."
        )
    if not partial.is_dir() or (any(partial.iterdir()) and not (partial / _LOCK_FILE).exists()):
        raise CheckpointError(
            f"{partial} must be the work of an earlier run, found something else; move it, or "
            "choose another destination."
        )


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    with disk_errors(directory):
        lock = (directory / _LOCK_FILE).open("w")
    with lock:
        with disk_errors(directory):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CheckpointError(
                    f"Only one process may write to {directory}, found another one; wait for it."
                ) from error
        yield


def _clear(directory: Path) -> None:
    with disk_errors(directory):
        for path in directory.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != _LOCK_FILE:
                path.unlink()


def _put_in_place(partial: Path, destination: Path) -> None:
    """A checkpoint that is replaced is deleted when the new one has its name."""
    for path in partial.rglob("*"):
        sync_file(path)
    sync_directory(partial)
    with disk_errors(destination):
        replaced = _replaced_of(destination)
        if destination.exists():
            destination.rename(replaced)
        partial.rename(destination)
        sync_directory(destination.parent)
        # Only now: a run that ends before the rename is continued, not repeated.
        for name in (STATE_FILE, _LOCK_FILE):
            (destination / name).unlink(missing_ok=True)
        if replaced.exists():
            shutil.rmtree(replaced)
