"""The result of an evaluation: rows of a sparse model beside its dense original."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

from samoyeds_hf.errors import EvaluationError


@dataclass(frozen=True)
class EvalRow:
    """One metric of one task: the sparse model's value and, if measured, the dense one's."""

    task: str
    metric: str  # lm-eval's filter follows after a comma, unless it is "none"
    higher_is_better: bool | None  # None: lm-eval does not say
    num_samples: int
    sparse: float
    sparse_stderr: float | None = None  # None: lm-eval has no estimate for this metric
    dense: float | None = None
    dense_stderr: float | None = None

    @property
    def recovery(self) -> float | None:
        """How much of the dense quality is left, in percent; above 100 is better than dense.

        sparse / dense where higher is better, dense / sparse where lower is, such as perplexity.
        None without a dense value, where it is 0, where the direction is unknown, and where the
        ratio says nothing: a divisor that is not positive, inf or nan.
        """
        if not self.dense or self.higher_is_better is None:
            return None
        over, under = self.sparse, self.dense
        if not self.higher_is_better:
            over, under = under, over
        if under <= 0 or not (math.isfinite(over) and math.isfinite(under)):
            return None
        return 100 * over / under


@dataclass(frozen=True)
class EvalReport:
    """What was measured, on what, with which settings; ``str`` is a plain text table."""

    model: str
    pattern: str | None  # None: the model holds dense weights
    dtype: str
    against: str | None
    against_dtype: str | None
    device: str
    limit: int | None
    num_fewshot: int | None
    seed: int | None
    versions: dict[str, str]
    rows: tuple[EvalRow, ...]

    def to_json(self) -> str:
        """The report as strict JSON, each row with its recovery; inf and nan become strings."""
        data = asdict(self)
        data["rows"] = [
            {name: _finite_or_text(value) for name, value in asdict(row).items()}
            | {"recovery": row.recovery}
            for row in self.rows
        ]
        return json.dumps(data, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "EvalReport":
        """Read what :meth:`to_json` wrote; raises EvaluationError if it is something else."""
        try:
            data = json.loads(text)
            rows = tuple(_row_from_json(row) for row in data.pop("rows"))
            return cls(rows=rows, **data)
        except (ValueError, TypeError, KeyError, AttributeError) as err:
            raise EvaluationError(
                f"an evaluation report must be JSON as EvalReport.to_json writes it, got {err!r}: "
                "write it again with `samoyeds eval --output`"
            ) from err

    def __str__(self) -> str:
        kind = "sparse" if self.pattern else "model"
        lines = [f"{kind:6}  {self.model} ({self.pattern or 'not sparse'}, {self.dtype})"]
        head = ["task", "metric", "better", "samples", kind, "dense", "recovery"]
        if self.against is None:
            head = head[:5]
        else:
            lines.append(f"dense   {self.against} ({self.against_dtype})")
        lines += ["", *_table([head, *(_cells(row)[: len(head)] for row in self.rows)]), ""]
        settings = [self.device]
        if self.limit is not None:
            settings.append(f"limit {self.limit} samples a task")
        if self.num_fewshot is not None:
            settings.append(f"{self.num_fewshot}-shot")
        settings += [f"{name} {version}" for name, version in self.versions.items()]
        return "\n".join([*lines, ", ".join(settings)])


def rows_from_results(
    sparse: Mapping[str, Any], dense: Mapping[str, Any] | None = None
) -> tuple[EvalRow, ...]:
    """One row for each number in lm-eval's results of one model, or of two on the same tasks."""
    rows = []
    for task, metrics in sparse["results"].items():
        dense_metrics = {} if dense is None else dense["results"][task]
        for key, value in metrics.items():
            # "acc,none" is a metric and its filter; other keys, such as "alias", describe the task
            name, comma, chain = key.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, Real):
                continue
            stderr_key = f"{name}_stderr,{chain}"
            rows.append(
                EvalRow(
                    task=task,
                    metric=name if chain == "none" else key,
                    higher_is_better=sparse["higher_is_better"].get(task, {}).get(name),
                    num_samples=int(metrics["sample_len"]),
                    sparse=float(value),
                    sparse_stderr=_number(metrics.get(stderr_key)),
                    dense=_number(dense_metrics.get(key)),
                    dense_stderr=_number(dense_metrics.get(stderr_key)),
                )
            )
    return tuple(rows)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, Real) else None  # "N/A" where lm-eval has none


_FLOATS = ("sparse", "sparse_stderr", "dense", "dense_stderr")


def _finite_or_text(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _row_from_json(data: dict[str, Any]) -> EvalRow:
    data = {name: value for name, value in data.items() if name != "recovery"}
    numbers = {name: float(data[name]) for name in _FLOATS if data[name] is not None}
    return EvalRow(**(data | numbers))


def _cells(row: EvalRow) -> list[str]:
    better = {True: "higher", False: "lower", None: "?"}[row.higher_is_better]
    recovery = "-" if row.recovery is None else f"{row.recovery:.1f} %"
    sparse = _value(row.sparse, row.sparse_stderr)
    dense = _value(row.dense, row.dense_stderr)
    return [row.task, row.metric, better, str(row.num_samples), sparse, dense, recovery]


def _value(value: float | None, stderr: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Padded columns: three of words to the left, then numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
