"""A checkpoint's report, read again and written as CSV, JSON or a plot."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

from samoyeds_hf.directory import DISTILLATION_KEY, REPORT_FILE
from samoyeds_hf.errors import CheckpointError, SamoyedsError
from samoyeds_hf.report import PatchReport, WeightReport
from samoyeds_hf.shards import write_text

_LAYER = re.compile(r"\.(\d+)\.")

_Line: TypeAlias = list[tuple[int, float]]  # layer, value
_Value: TypeAlias = Callable[[Sequence[WeightReport]], float | None]


def report_command(
    directory: str | Path,
    *,
    csv: str | Path | None = None,
    json: str | Path | None = None,
    plot: str | Path | None = None,
) -> PatchReport:
    """What ``samoyeds report`` does: print a checkpoint's report and write the files asked for.

    Raises:
        SamoyedsError: no report, a file that cannot be written, or a plot without matplotlib.
    """
    report = read_report(directory)
    print(report)
    if csv is not None:
        report.to_csv(csv)
    if json is not None:
        report.to_json(json)
    if plot is not None:
        report.plot(plot)
    for path in (csv, json, plot):
        if path is not None:
            print(f"written: {path}")
    return report


def read_report(directory: str | Path) -> PatchReport:
    """The report in a sparse checkpoint's directory, or in a file of its own.

    Raises:
        CheckpointError: none there, or one that cannot be read.
    """
    path = Path(directory)
    path = path / REPORT_FILE if path.is_dir() else path
    try:
        return PatchReport.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise CheckpointError(
            f"A report must be {REPORT_FILE} in the directory of a sparse checkpoint, found "
            f"{error.strerror or error} for {path}; 'samoyeds convert' writes it."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} must be a report as the conversion wrote it, found something else "
            f"({type(error).__name__}: {error}); take the file from the checkpoint again."
        ) from error


def read_distillation(directory: str | Path) -> dict[str, Any]:
    """What the report of a sparse checkpoint says of its distillation; empty: nothing.

    Raises:
        CheckpointError: as :func:`read_report`.
    """
    read_report(directory)  # says what is wrong with it
    content = json.loads((Path(directory) / REPORT_FILE).read_text(encoding="utf-8"))
    return dict(content.get(DISTILLATION_KEY, {}))


def write_json(report: PatchReport, path: str | Path) -> None:
    """Write a report as strict JSON; :func:`read_report` reads it.

    Raises:
        CheckpointError: the file cannot be written.
    """
    write_text(Path(path), json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n")


_CSV_COLUMNS: dict[str, Callable[[WeightReport], Any]] = {
    "name": lambda weight: weight.name,
    "shape": lambda weight: "x".join(map(str, weight.shape)),
    "pattern": lambda weight: weight.pattern,
    "bytes_before": lambda weight: weight.bytes_before,
    "bytes_after": lambda weight: weight.bytes_after,
    "error": lambda weight: None if math.isnan(weight.error) else weight.error,
    "output_error": lambda weight: weight.output_error,
    "tokens_min": lambda weight: min(weight.tokens, default=None),
    "tokens_median": lambda weight: median(weight.tokens) if weight.tokens else None,
    "tokens_max": lambda weight: max(weight.tokens, default=None),
    "seconds": lambda weight: weight.seconds,
    "notes": lambda weight: "; ".join(weight.notes),
}


def write_csv(report: PatchReport, path: str | Path) -> None:
    """Write a row for each weight; a cell is empty where nothing was measured.

    Raises:
        CheckpointError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    for weight in report.weights:
        writer.writerow([cell(weight) for cell in _CSV_COLUMNS.values()])
    write_text(Path(path), text.getvalue())


def write_plot(report: PatchReport, path: str | Path) -> None:
    """Draw errors, tokens of the experts and time over the layers, a line for each kind of weight.

    Experts that are weights of their own count together: their mean error, their summed time. What
    was not measured has no panel. The suffix of the file is its format: png, svg or pdf.

    Raises:
        SamoyedsError: matplotlib is missing, nothing to draw, an unknown suffix, or a file that
            cannot be written.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot, which would choose a screen
    except ImportError as error:
        raise SamoyedsError(
            f"A plot needs matplotlib, which cannot be imported ({error}); "
            "pip install 'samoyeds-hf[plots]'."
        ) from error
    panels = _panels(report)
    if not panels:
        raise SamoyedsError(
            "A plot needs a report with at least one weight, found none; nothing was made sparse."
        )
    figure = Figure(figsize=(10, 2.6 * len(panels) + 0.8), layout="constrained")
    axes: Any = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (label, lines) in zip(axes, panels, strict=True):
        for name, line in lines.items():
            axis.plot(*zip(*line, strict=True), marker="o", markersize=3, label=name)
        axis.set(ylabel=label, ylim=(0, None))
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axes[-1].set(xlabel="layer")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    about = [report.describe_method(), report.describe_calibration()]
    figure.suptitle("\n".join(filter(None, about)), fontsize=10)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).rstrip(".")
        raise SamoyedsError(
            f"A plot must be a .png, .svg or .pdf file in an existing directory, found {path} "
            f"({reason}); name another one."
        ) from error


def _panels(report: PatchReport) -> list[tuple[str, dict[str, _Line]]]:
    """What is drawn: the label of each panel, and its lines by name."""
    panels: dict[str, dict[str, _Value]] = {
        "error of the outputs": {"": lambda weights: _mean(w.output_error for w in weights)},
        "error of the weights": {"": lambda weights: _mean(w.error for w in weights)},
        "tokens of an expert": {
            "median, ": lambda weights: _over_experts(median, weights),
            "fewest, ": lambda weights: _over_experts(min, weights),
        },
        "seconds": {"": lambda weights: _sum(w.seconds for w in weights)},
    }
    kinds = _by_kind_and_layer(report)
    drawn = []
    for label, values in panels.items():
        lines: dict[str, _Line] = {}
        for kind, layers in kinds.items():
            for prefix, value in values.items():
                points = [(layer, value(weights)) for layer, weights in layers.items()]
                lines[prefix + kind] = [(layer, y) for layer, y in points if y is not None]
        if any(lines.values()):
            drawn.append((label, {name: line for name, line in lines.items() if line}))
    return drawn


def _by_kind_and_layer(report: PatchReport) -> dict[str, dict[int, list[WeightReport]]]:
    """Weights by what follows the layer's number in their names, without an expert's number."""
    kinds: dict[str, dict[int, list[WeightReport]]] = {}
    for weight in report.weights:
        _, *found = _LAYER.split(weight.name, maxsplit=1)
        layer, rest = (int(found[0]), found[1]) if found else (0, weight.name)
        kind = re.sub(r"\.\d+(?=\.)", "", rest)
        kinds.setdefault(kind, {}).setdefault(layer, []).append(weight)
    return {kind: dict(sorted(layers.items())) for kind, layers in kinds.items()}


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None and not math.isnan(value)]
    return sum(found) / len(found) if found else None


def _sum(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) if found else None


def _over_experts(
    reduce: Callable[[list[int]], float], weights: Sequence[WeightReport]
) -> float | None:
    tokens = [count for weight in weights for count in weight.tokens]
    return reduce(tokens) if tokens else None
