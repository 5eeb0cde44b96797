"""Rows of measurements, in a CSV file that grows as they come."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from statistics import mean

import torch
import transformers
from bench.record import machine, merge_rows
from lab.cells import Cell

Row = Mapping[str, str]
CELL = tuple(field.name for field in fields(Cell))
KEY = ("family", "size", "seed", *CELL)


class Results:
    """The file and what is in it; a cell that is there needs no second measurement."""

    def __init__(self, path: Path, model: Mapping[str, object]) -> None:
        self.path, self.model = path, {name: str(value) for name, value in model.items()}
        self.rows = read_rows(path)

    def key(self, cell: Cell) -> tuple[str, ...]:
        """What tells rows apart."""
        columns = {**self.model, **asdict(cell)}
        return tuple(str(columns[name]) for name in KEY)

    def __contains__(self, cell: Cell) -> bool:
        """Also what another process has added meanwhile."""
        self.rows = read_rows(self.path)
        key = self.key(cell)
        return any(tuple(row[name] for name in KEY) == key for row in self.rows)

    def add(self, cell: Cell, values: Mapping[str, object], about: Mapping[str, object]) -> None:
        """Write one row at once."""
        row = {**self.model, **asdict(cell), **values, **about}
        merge_rows(self.path, [row], KEY)
        self.rows = read_rows(self.path)

    def seconds(self, cell: Cell, unknown: float) -> float:
        """What such a cell took so far; ``unknown`` if there was none."""
        alike = [row for row in self.rows if _kind(row) == _kind(asdict(cell))]
        return mean(float(row["seconds"]) for row in alike) if alike else unknown


def _kind(columns: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(columns[name] for name in ("method", "recovery", "path"))


def read_rows(path: Path) -> list[dict[str, str]]:
    """All rows of a file, none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def about(device: torch.device) -> dict[str, object]:
    """Columns that say where a number comes from."""
    is_cuda = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if is_cuda else "none",
        "cuda": torch.version.cuda or "none",
        "transformers": transformers.__version__,
        **machine(),
    }


def over_seeds(rows: Iterable[Row], column: str) -> dict[Cell, list[float]]:
    """Values of a column by cell, one for each seed that has it."""
    found: dict[Cell, list[float]] = defaultdict(list)
    for row in rows:
        if row.get(column):
            found[Cell(**{name: row[name] for name in CELL})].append(float(row[column]))
    return dict(found)
