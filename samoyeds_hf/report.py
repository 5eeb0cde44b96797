"""What was made sparse: rows, sizes and errors, as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any

_NOTES_SHOWN = 10


@dataclass(frozen=True)
class WeightReport:
    """One weight that became sparse; what calibration adds is None or empty without it."""

    name: str
    shape: tuple[int, ...]  # dense
    pattern: str
    bytes_before: int
    bytes_after: int
    error: float  # relative Frobenius error |W - decode(encode(W))| / |W|; nan if not measured
    output_error: float | None = None  # relative, tr((W - Q) H (W - Q)^T) / tr(W H W^T)
    tokens: tuple[int, ...] = ()  # calibration tokens that each expert saw
    seconds: float | None = field(default=None, compare=False)  # for pruning it
    notes: tuple[str, ...] = ()  # what was done otherwise than asked for, such as "expert 3: ..."

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> WeightReport:
        """One of ``weights`` in a report's JSON; fields of later versions are left out.

        Raises:
            TypeError: a field is missing, or of another kind.
        """
        known = _known(cls, entry)
        if known.get("error", 0.0) is None:
            known["error"] = math.nan
        for name in ("shape", "tokens", "notes"):
            known[name] = tuple(known.get(name, ()))
        return cls(**known)


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
    refine: bool = False
    asymmetric: bool = False
    permute: bool = False
    recover: str | None = None
    trained: str | None = None  # beside pruned weights: "layers", all of theirs; "all"; or nothing
    calibration: dict[str, Any] | None = None  # Calibration.to_dict(), without a path

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

    @property
    def output_error(self) -> float | None:
        """Relative error of the outputs on calibration data, averaged over the weights."""
        found = [w.output_error for w in self.weights if w.output_error is not None]
        return sum(found) / len(found) if found else None

    @property
    def tokens(self) -> tuple[int, float] | None:
        """Fewest calibration tokens that an expert saw, and their median over all experts.

        Over all weights, so that an expert counts once for each of its projections.
        """
        counts = [count for weight in self.weights for count in weight.tokens]
        return (min(counts), median(counts)) if counts else None

    @property
    def notes(self) -> list[str]:
        """The notes of all weights, with their names."""
        return [f"{weight.name}: {note}" for weight in self.weights for note in weight.notes]

    def describe_method(self) -> str:
        """``admm, refined, recovered by block``."""
        words = [self.method]
        words += ["refined"] if self.refine else []
        words += ["asymmetric"] if self.asymmetric else []
        words += ["neurons reordered"] if self.permute else []
        words += [f"recovered by {self.recover}"] if self.recover else []
        return ", ".join(words)

    def describe_calibration(self) -> str | None:
        """``128 x 2048 tokens of novels.txt, seed 0``; None for a report without calibration."""
        if self.calibration is None:
            return None
        return "{samples} x {sequence_length} tokens of {data}, seed {seed}".format_map(
            self.calibration
        )

    def to_dict(self) -> dict[str, Any]:
        """What strict JSON can hold; an error that was not measured is None."""
        content = asdict(self)
        for weight in content["weights"]:
            weight["error"] = None if math.isnan(weight["error"]) else weight["error"]
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> PatchReport:
        """The report that :meth:`to_dict` gave, of this or an earlier version.

        Raises:
            TypeError, KeyError: not a report.
        """
        known = _known(cls, content)
        known["weights"] = tuple(map(WeightReport.from_dict, content["weights"]))
        known["skipped"] = tuple(Skipped(**entry) for entry in content["skipped"])
        report = cls(**known)
        report.describe_calibration()  # here, rather than in the middle of a table
        return report

    def to_json(self, path: str | Path) -> None:
        """Write it as JSON, see :func:`samoyeds_hf.report_files.write_json`."""
        from samoyeds_hf.report_files import write_json

        write_json(self, path)

    def to_csv(self, path: str | Path) -> None:
        """Write a row for each weight, see :func:`samoyeds_hf.report_files.write_csv`."""
        from samoyeds_hf.report_files import write_csv

        write_csv(self, path)

    def plot(self, path: str | Path) -> None:
        """Draw errors, tokens and time, see :func:`samoyeds_hf.report_files.write_plot`."""
        from samoyeds_hf.report_files import write_plot

        write_plot(self, path)

    def __str__(self) -> str:
        columns = _COLUMNS
        if any(weight.output_error is not None or weight.tokens for weight in self.weights):
            columns = {**_COLUMNS, **_CALIBRATED_COLUMNS}
        total = (
            f"total: {len(self.weights)} weights",
            "",
            "",
            format_bytes(self.bytes_before),
            format_bytes(self.bytes_after),
            f"{self.error:.4f}",
            _cell(self.output_error),
            _count_cell(self.tokens),
        )
        rows = [[cell(weight) for cell in columns.values()] for weight in self.weights]
        lines = [format_table(list(columns), [*rows, total[: len(columns)]])]
        lines.append(f"method: {self.describe_method()}")
        lines += [f"calibration: {found}" for found in [self.describe_calibration()] if found]
        lines += [f"left dense: {skip.name}: {skip.reason}" for skip in self.skipped]
        lines += [f"note: {note}" for note in shortened(self.notes, _NOTES_SHOWN)]
        return "\n".join(lines)


def _known(cls: type[Any], content: Mapping[str, Any]) -> dict[str, Any]:
    names = [field.name for field in fields(cls)]
    return {name: content[name] for name in names if name in content}


def _cell(error: float | None) -> str:
    return "-" if error is None else f"{error:.4f}"


def _count_cell(tokens: tuple[int, float] | None) -> str:
    return "-" if tokens is None else f"{tokens[0]} / {tokens[1]:.0f}"


_COLUMNS: dict[str, Callable[[WeightReport], str]] = {
    "weight": lambda weight: weight.name,
    "dense shape": lambda weight: "x".join(map(str, weight.shape)),
    "pattern": lambda weight: weight.pattern,
    "before": lambda weight: format_bytes(weight.bytes_before),
    "after": lambda weight: format_bytes(weight.bytes_after),
    "rel. error": lambda weight: f"{weight.error:.4f}",
}
_CALIBRATED_COLUMNS: dict[str, Callable[[WeightReport], str]] = {
    "output error": lambda weight: _cell(weight.output_error),
    "tokens min / median": lambda weight: _count_cell(
        (min(weight.tokens), median(weight.tokens)) if weight.tokens else None
    ),
}


def shortened(notes: Sequence[str], most: int) -> list[str]:
    """The first notes, and how many follow."""
    more = len(notes) - most
    return [*notes[:most], *([f"{more} more in samoyeds_report.json"] if more > 0 else [])]


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
