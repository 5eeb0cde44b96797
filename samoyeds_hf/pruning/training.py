"""What training after pruning shares: schedule, order, checks, a CSV log, and a state file.

The state file is at any moment whole, or the one before.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch

from samoyeds_hf.errors import CalibrationError, CheckpointError, ConfigError
from samoyeds_hf.shards import TEMPORARY, disk_errors, sync_directory, sync_file, write_text

# What one step did: column -> value.
Log: TypeAlias = Callable[[Mapping[str, float]], None]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Refuse what is no integer, or below ``least``.

    Raises:
        ConfigError: names the setting.
    """
    if type(value) is not int or value < least:
        raise ConfigError(f"{name} must be an integer from {least} on, found {value!r}.")


def check_number(name: str, value: Any, low: float, high: float, *, or_low: bool = False) -> None:
    """Refuse what is not a number between ``low`` and ``high``, or ``low`` where that is allowed.

    Raises:
        ConfigError: names the setting.
    """
    if type(value) in (int, float) and (low < value < high or (or_low and value == low)):
        return
    start = f"{'from' if or_low else 'above'} {low:g}{' on' if or_low else ''}"
    raise ConfigError(f"{name} must be a number {start} and below {high:g}, found {value!r}.")


def check_tokens(tokens: torch.Tensor, vocabulary: int) -> None:
    """Refuse what are not sequences ``[N, S]`` of a model's tokens.

    Raises:
        CalibrationError: says what was found.
    """
    if tokens.ndim != 2 or tokens.dtype != torch.int64 or not tokens.numel():
        raise CalibrationError(
            f"Training needs sequences [N, S] int64, found {tokens.dtype} {list(tokens.shape)}; "
            "cut the text into windows."
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise CalibrationError(
            f"Tokens must be in 0..{vocabulary - 1}, found {int(tokens.min())} to "
            f"{int(tokens.max())}; use the model's own tokenizer."
        )


def schedule(step: int, steps: int, warmup: float) -> float:
    """Factor of the peak learning rate at step 0..steps-1: linear warmup, then linear to zero."""
    progress = (step + 0.5) / steps
    if progress < warmup:
        return progress / warmup
    return (1 - progress) / (1 - warmup)


def pick(step: int, batch_size: int, count: int, seed: int) -> torch.Tensor:
    """The rows ``[batch_size]`` int64 of ``count`` that a step takes.

    Epochs in fresh random order, one after the other; a function of its arguments alone, so that
    work which continues sees what it would have seen.
    """
    rows = torch.arange(step * batch_size, (step + 1) * batch_size)
    orders = {epoch: _order(epoch, count, seed) for epoch in set((rows // count).tolist())}
    return torch.stack([orders[row // count][row % count] for row in rows.tolist()])


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """A checksum of named tensors: exact, alike on every device, cheap on tensors of any size."""
    sha = hashlib.sha256()
    for name, tensor in tensors.items():
        bits = tensor.detach().contiguous().view(-1).view(_BITS[tensor.element_size()])
        total = int(bits.sum(dtype=torch.int64))
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)} {total}\n".encode())
    return sha.hexdigest()


def save_state(path: Path, content: Mapping[str, Any]) -> None:
    """Replace the state file in one step.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    with disk_errors(path):
        try:
            torch.save(dict(content), temporary)
        except RuntimeError as error:  # how torch reports a full disk
            raise OSError(str(error).splitlines()[0]) from error
        sync_file(temporary)
        os.replace(temporary, path)
    sync_directory(path.parent)


def load_state(
    path: Path, fingerprint: Mapping[str, Any], keys: Iterable[str]
) -> dict[str, Any] | None:
    """What was saved under these keys, on the CPU; None where nothing was.

    Raises:
        CheckpointError: unreadable, without one of the keys, or of other work than ``fingerprint``
            says.
    """
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found, held = dict(content["fingerprint"]), {key: content[key] for key in keys}
    except Exception as error:  # torch has no base class for what a damaged file raises
        raise CheckpointError(
            f"{path} must be the state of an interrupted run, found it unreadable "
            f"({type(error).__name__}); delete it or start again with --overwrite."
        ) from error
    if different := [key for key, value in fingerprint.items() if found.get(key) != value]:
        raise CheckpointError(
            f"{path} must be the state of the same run, found another {different[0]}; give "
            "the same settings and data to the same version, or start again with --overwrite."
        )
    return held


class CsvLog:
    """Appends rows to a CSV file; called with a step that is there, it goes on from before it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._is_open = False

    def __call__(self, row: Mapping[str, float]) -> None:
        """Write one row; its ``step`` orders the file.

        Raises:
            CheckpointError: the file is not writable.
        """
        if not self._is_open:
            self._rewind(row)
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(_line(_text(value) for value in row.values()))

    def _rewind(self, row: Mapping[str, float]) -> None:
        """Keep the rows of earlier steps: a run that was killed had written more than it saved."""
        kept = [_line(row)]
        if self.path.exists():
            with disk_errors(self.path):
                lines = list(csv.reader(self.path.read_text(encoding="utf-8").splitlines()))
            place = list(row).index("step")
            kept += [
                _line(line)
                for line in lines[1:]
                if len(line) == len(row) and int(line[place]) < row["step"]
            ]
        write_text(self.path, "".join(kept))
        self._is_open = True


def _order(epoch: int, count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator)


def _text(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def _line(cells: Iterable[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue()
