"""What a reader needs to judge a number, and the files that keep them together."""

from __future__ import annotations

import csv
import fcntl
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

Row = Mapping[str, object]


def machine() -> dict[str, str | int]:
    """Columns for every row of a result file."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count() or 1,
        "torch": torch.__version__,
        "commit": commit(),
    }


def gpu_machine(device: torch.device) -> dict[str, str | int]:
    """The same with the GPU and the kernels, which are built now if they can be."""
    import transformers

    from samoyeds_hf import library

    is_cuda = device.type == "cuda"
    kernels = library.load() if is_cuda else None
    return {
        "gpu": torch.cuda.get_device_name(device) if is_cuda else "none",
        "cuda": torch.version.cuda or "none",
        "transformers": transformers.__version__,
        "kernels": f"{kernels.layout}, {kernels.build_info}" if kernels else "none",
        **machine(),
    }


def commit() -> str:
    """Short hash of the checkout; SAMOYEDS_COMMIT says it where the history did not come along."""
    if named := os.environ.get("SAMOYEDS_COMMIT"):
        return named
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(git, check=False, capture_output=True, text=True)
    return done.stdout.strip() or "uncommitted"


def merge_rows(path: Path, rows: Sequence[Row], key: Sequence[str]) -> None:
    """Write rows, in place of those with the same ``key`` columns; the other rows stay.

    All columns of both are kept, so that results of two versions of a script can share a file.
    Several processes may write to one file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone_in(path.parent):
        old: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                old = list(csv.DictReader(file))
        written = {tuple(str(row[name]) for name in key) for row in rows}
        kept = [row for row in old if tuple(row.get(name, "") for name in key) not in written]
        columns = list(dict.fromkeys(name for row in (*rows, *kept) for name in row))
        partial = path.with_suffix(".partial")  # a run that is stopped here loses nothing
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows([*kept, *rows])
        partial.replace(path)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """No other process is in here for the same folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # and the lock with it
