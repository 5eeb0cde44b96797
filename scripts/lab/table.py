"""The results as markdown, with the targets beside them. From the CSV file alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import mean

from lab.cells import (
    BLOCK,
    BUDGET,
    DENSE,
    DISTILL,
    IDEAS,
    KERNELS,
    MASKED,
    METHODS,
    NONE,
    PATTERNS,
    RECOVERIES,
    VENOM,
    Cell,
)
from lab.results import Row, over_seeds
from lab.targets import BEST_RECIPE, RECIPE, TARGETS, Target

Ratios = Mapping[Cell, Sequence[float]]
_NOTE = (
    "Lowest mean over seeds of all methods, distilled also after block recovery, chosen on the "
    "held-out text that it is given on. "
    "VENOM, unstructured masks and dense columns exist as masks only: what refines them is least "
    "squares, without the search for better masks that the patterns of the format get."
)
_IDEAS_NOTE = "Means over the seeds that have an idea, beside those of the same seeds without it."
_NAMES = {NONE: "one-shot", DISTILL: "distilled"}


def markdown(rows: Sequence[Row]) -> str:
    """A section for each family and size."""
    models = dict.fromkeys((row["family"], row["size"]) for row in rows)
    sections = []
    for family, size in models:
        own = [row for row in rows if (row["family"], row["size"]) == (family, size)]
        sections.append("\n\n".join([f"## {family}, {size}", *_section(own)]))
    return "\n\n".join(sections)


def _section(rows: list[Row]) -> Iterator[str]:
    by_seed = _by_seed(rows)
    yield _about(rows)
    yield "### Targets\n\n" + _targets(rows, over_seeds(rows, "ratio"))
    for recovery in RECOVERIES:
        # A table a seed: models differ by more than methods do, and not every one has every cell.
        grids = {seed: _grid(ratios, recovery) for seed, ratios in by_seed.items()}
        if any(grids.values()):
            yield f"### Perplexity relative to dense, {_NAMES.get(recovery, recovery)}"
        yield from (f"Seed {seed}:\n\n{grid}" for seed, grid in grids.items() if grid)
    if ideas := _ideas(by_seed):
        yield f"### At the bytes of {BUDGET}\n\n{ideas}\n\n{_IDEAS_NOTE}"
    if kernels := _kernels(by_seed):
        yield "### Through the encoded experts\n\n" + kernels
    yield "### Multiple choice, normalised by length, zero-shot\n\n" + _tasks(rows)


def _about(rows: Sequence[Row]) -> str:
    """The dense models, one for each seed."""
    head = ("seed", "parameters", "tokens seen", "epochs", "validation", "held out")
    dense = {row["weights"]: row for row in rows if row["pattern"] == DENSE}
    lines = [
        (
            row["seed"],
            f"{int(row['parameters']) / 1e6:.1f} M",
            f"{int(row['trained_tokens']) / 1e6:.1f} M",
            f"{float(row['epochs']):.1f}",
            f"{float(row['validation']):.2f}",
            f"{float(row['perplexity']):.2f}",
        )
        for row in dense.values()
    ]
    first = rows[0]
    where = (
        f"{first['gpu']}, CUDA {first['cuda']}, torch {first['torch']}, transformers "
        f"{first['transformers']}, commit {', '.join(dict.fromkeys(r['commit'] for r in rows))}"
    )
    return f"{_table(head, lines)}\n\n{where}"


def _targets(rows: Sequence[Row], ratios: Ratios) -> str:
    head = ("pattern", "", "must", "aim", "measured", "by", "is met")
    lines = []
    recipes = _within_budget(rows)
    for (pattern, recovery), target in TARGETS.items():
        found = _lowest(
            ratios, lambda c, p=pattern, r=recovery: _plain(c)[0] == p and _ends_with(c, r)
        )
        lines.append(_target_line(pattern, recovery, target, target.must, found))
    for recovery, target in BEST_RECIPE.items():
        found = _lowest(ratios, lambda c, r=recovery: c in recipes and _ends_with(c, r))
        must = target.must
        if must is None and found is not None:
            must = _mean(ratios.get(Cell(VENOM, found[0].method, recovery)))
        lines.append(_target_line(RECIPE, recovery, target, must, found))
    return f"{_table(head, lines)}\n\n{_NOTE}"


def _target_line(
    what: str,
    recovery: str,
    target: Target,
    must: float | None,
    found: tuple[Cell, float, int] | None,
) -> tuple[str, ...]:
    bound = "-" if must is None else f"{must:.3f}"
    bound += " (VENOM)" if target.must is None else ""
    start = (what, _NAMES[recovery], bound, f"{target.aim:.3f}")
    if found is None:
        return (*start, "-", "-", "-")
    cell, ratio, seeds = found
    by = cell.method if cell.ideas == NONE else f"{cell.method}, {cell.ideas}"
    if cell.pattern != what:
        by = f"{cell.pattern} {by}"
    if BLOCK in cell.steps:
        by += ", after block recovery"
    measured = f"{ratio:.3f} ({seeds} seed{'s' * (seeds > 1)})"
    return (*start, measured, by, target.verdict(ratio, must))


def _by_seed(rows: Sequence[Row]) -> dict[str, dict[Cell, float]]:
    """The ratios of each model."""
    seeds = sorted({row["seed"] for row in rows}, key=int)
    return {
        seed: {
            cell: mean(values)
            for cell, values in over_seeds([r for r in rows if r["seed"] == seed], "ratio").items()
        }
        for seed in seeds
    }


def _grid(ratios: Mapping[Cell, float], recovery: str) -> str:
    """Patterns by methods; empty where nothing was measured."""
    shown = {c: v for c, v in ratios.items() if _is_plain(c) and c.recovery == recovery}
    methods = [method for method in METHODS if any(cell.method == method for cell in shown)]
    lines = []
    for pattern in PATTERNS:
        values = [shown.get(Cell(pattern, method, recovery)) for method in methods]
        if any(value is not None for value in values):
            lines.append((pattern, *("" if v is None else f"{v:.3f}" for v in values)))
    return _table(("pattern", *methods), lines) if lines else ""


def _ideas(by_seed: Mapping[str, Mapping[Cell, float]]) -> str:
    """Ideas by pattern and method, each beside the same seeds without it."""
    cells = [c for ratios in by_seed.values() for c in ratios if c.ideas != NONE]
    recoveries = [name for name in RECOVERIES if any(c.recovery == name for c in cells)]
    cases = dict.fromkeys((c.pattern, c.method, c.ideas) for c in cells)
    lines = []
    for pattern, method, ideas in sorted(cases, key=lambda case: IDEAS.index(case[2])):
        shown: list[str] = []
        for recovery in recoveries:
            cell = Cell(pattern, method, recovery, ideas)
            having = [ratios for ratios in by_seed.values() if cell in ratios]
            plain = replace(cell, ideas=NONE)
            pairs = [(r[cell], r[plain]) for r in having if plain in r]
            shown += [f"{mean(r[cell] for r in having):.3f}" if having else "", ""]
            if pairs and len(pairs) == len(having):
                shown[-1] = f"{mean(without for _, without in pairs):.3f}"
        lines.append((pattern, method, ideas, *shown))
    columns = (text for name in recoveries for text in (_NAMES.get(name, name), "without"))
    return _table(("pattern", "method", "ideas", *columns), lines) if lines else ""


def _kernels(by_seed: Mapping[str, Mapping[Cell, float]]) -> str:
    """What is encoded beside its masks in the dense model of the same seed."""
    lines = []
    for seed, ratios in by_seed.items():
        for cell, ratio in ratios.items():
            if cell.path != KERNELS:
                continue
            twin = ratios.get(replace(cell, path=MASKED))
            other = ("", "") if twin is None else (f"{twin:.5f}", f"{ratio / twin - 1:+.2e}")
            lines.append((str(cell), seed, f"{ratio:.5f}", *other))
    head = ("cell", "seed", "encoded", MASKED, "difference")
    return _table(head, lines) if lines else ""


def _tasks(rows: Sequence[Row]) -> str:
    """Dense, then the best method of each pattern; a model of this size is near chance."""
    tasks = [name.removesuffix("_norm") for name in rows[0] if name.endswith("_norm")]
    lines = []
    for pattern in (DENSE, *PATTERNS):
        for recovery in (NONE, DISTILL):
            own = [
                row
                for row in rows
                if (row["pattern"], row["recovery"], row["ideas"], row["path"])
                == (pattern, recovery, NONE, MASKED)
                and row["method"] in (METHODS[0], DENSE)
            ]
            if own:
                cells = (
                    f"{100 * mean(float(row[f'{task}_norm']) for row in own):.1f} "
                    f"± {100 * float(own[0][f'{task}_error']) / len(own) ** 0.5:.1f}"
                    for task in tasks
                )
                lines.append((pattern, _NAMES[recovery] if pattern != DENSE else "", *cells))
    chances = ", ".join(f"{task} {100 * float(rows[0][f'{task}_chance']):.1f}" for task in tasks)
    note = (
        f"Per cent ± standard error; chance is {chances}. A model of this size, trained on novels, "
        "is near chance: these show that nothing broke, not which method is better."
    )
    return f"{_table(('pattern', '', *tasks), lines)}\n\n{note}" if tasks else "None were given."


def _lowest(ratios: Ratios, is_meant: Callable[[Cell], bool]) -> tuple[Cell, float, int] | None:
    """The cell with the lowest mean among those meant, its mean, and how many seeds it has."""
    found = [(mean(v), len(v), cell) for cell, v in ratios.items() if is_meant(cell)]
    if not found:
        return None
    ratio, seeds, cell = min(found, key=lambda item: item[0])
    return cell, ratio, seeds


def _is_plain(cell: Cell) -> bool:
    return cell.ideas == NONE and cell.path == MASKED


def _plain(cell: Cell) -> tuple[str, str]:
    return (cell.pattern, cell.recovery) if _is_plain(cell) else ("", "")


def _ends_with(cell: Cell, recovery: str) -> bool:
    return (cell.steps or (NONE,))[-1] == recovery


def _within_budget(rows: Sequence[Row]) -> set[Cell]:
    """Cells in this format with no more bytes than BUDGET has."""
    sizes = {
        cell: max(values)
        for cell, values in over_seeds(rows, "bytes").items()
        if cell.path == MASKED
    }
    limit = max((size for cell, size in sizes.items() if _plain(cell)[0] == BUDGET), default=0.0)
    return {cell for cell, size in sizes.items() if size <= limit}


def _mean(values: Sequence[float] | None) -> float | None:
    return mean(values) if values else None


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
