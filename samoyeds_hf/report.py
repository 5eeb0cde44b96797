"""What was made sparse: rows, sizes and errors, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class WeightReport:
    """One weight that became sparse."""

    name: str
    shape: tuple[int, ...]  # dense
    pattern: str
    bytes_before: int
    bytes_after: int
    error: float  # relative Frobenius error |W - decode(encode(W))| / |W|; nan if not measured


@dataclass(frozen=True)
class Skipped:
    """A module left as it was."""

    name: str
    reason: str


@dataclass(frozen=True)
class PatchReport:
    """What :func:`samoyeds_hf.patch_model` or the converter did. ``str`` is a table."""

    weights: tuple[WeightReport, ...]
    skipped: tuple[Skipped, ...]
    method: str

    @property
    def bytes_before(self) -> int:
        """Bytes of all sparse weights when they were dense."""
        return sum(weight.bytes_before for weight in self.weights)

    @property
    def bytes_after(self) -> int:
        """Bytes of their values, meta and index."""
        return sum(weight.bytes_after for weight in self.weights)

    @property
    def error(self) -> float:
        """Relative Frobenius error, averaged over the weights."""
        return sum(weight.error for weight in self.weights) / max(len(self.weights), 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [
            (
                weight.name,
                "x".join(map(str, weight.shape)),
                weight.pattern,
                format_bytes(weight.bytes_before),
                format_bytes(weight.bytes_after),
                f"{weight.error:.4f}",
            )
            for weight in self.weights
        ]
        total = (
            f"total: {len(self.weights)} weights",
            "",
            "",
            format_bytes(self.bytes_before),
            format_bytes(self.bytes_after),
            f"{self.error:.4f}",
        )
        head = ("weight", "dense shape", "pattern", "before", "after", "rel. error")
        lines = [format_table(head, [*rows, total]), f"method: {self.method}"]
        lines += [f"left dense: {skip.name}: {skip.reason}" for skip in self.skipped]
        return "\n".join(lines)


def format_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, right: bool = True) -> str:
    """Columns padded with blanks; the first to the left, the others to the right or left."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column and right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def format_bytes(num_bytes: float) -> str:
    """``1.50 GB`` (powers of 1000, as file sizes and the Hub have them)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000 or unit == "GB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.2f} {unit}"
        num_bytes /= 1000
    raise AssertionError("unreachable")
