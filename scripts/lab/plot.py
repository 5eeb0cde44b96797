"""A plot of the results. From the CSV file alone; needs matplotlib (extra `plots`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import matplotlib
from lab.cells import DISTILL, MASKED, METHODS, NONE, RECOVERIES, UNSTRUCTURED, VENOM, Cell
from lab.results import Row, over_seeds
from lab.targets import TARGETS

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_TOP = 1.4  # relative perplexities above are drawn at the edge
_TICKS = (1, 1.02, 1.05, 1.1, 1.15, 1.2, 1.3, _TOP)
# from what is kept most to the longest Sub-Rows
_PATTERNS = (
    *("2:4", "3:4:128", UNSTRUCTURED, VENOM),
    *("8:16:32", "4:8:32", "1:2:16", "1:2:32", "1:2:64", "1:2:128"),
)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Relative perplexity over patterns: methods to the left, recoveries to the right."""
    models = list(dict.fromkeys((row["family"], row["size"]) for row in rows))
    figure, axes = plt.subplots(
        len(models), 2, figsize=(15, 5 * len(models)), squeeze=False, sharey="row"
    )
    for line, model in zip(axes, models, strict=True):
        ratios = over_seeds((r for r in rows if (r["family"], r["size"]) == model), "ratio")
        plain = {c: v for c, v in ratios.items() if c.ideas == NONE and c.path == MASKED}
        one_shot = {m: [Cell(p, m) for p in _PATTERNS] for m in METHODS}
        recovered = {r: [Cell(p, recovery=r) for p in _PATTERNS] for r in RECOVERIES}
        _draw(line[0], one_shot, plain, NONE)
        _draw(line[1], recovered, plain, DISTILL)
        line[0].set(title=f"{model[0]}, {model[1]}: one-shot, by method", ylabel="x dense")
        line[1].set(title=f"{METHODS[0]}: by recovery")
    figure.suptitle(f"Held-out perplexity relative to dense; - is what must be met\n{_where(rows)}")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw(
    axis: plt.Axes,
    lines: dict[str, list[Cell]],
    ratios: dict[Cell, list[float]],
    recovery: str,
) -> None:
    """A line a label, a dot a seed; ticks where the targets of a recovery are."""
    for label, cells in lines.items():
        places = [place for place, cell in enumerate(cells) if cell in ratios]
        if not places:
            continue
        means = [min(mean(ratios[cells[place]]), _TOP) for place in places]
        (drawn,) = axis.plot(places, means, linewidth=1, label=label)
        dots = [(place, value) for place in places for value in ratios[cells[place]]]
        x, y = zip(*dots, strict=True)
        axis.scatter(x, [min(value, _TOP) for value in y], s=12, color=drawn.get_color())
    for place, pattern in enumerate(_PATTERNS):
        if target := TARGETS.get((pattern, recovery)):
            axis.plot(place, target.must, marker="_", color="black", markersize=18)
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set_yscale("log")
    axis.set_yticks(list(_TICKS), labels=[*(f"{tick:g}" for tick in _TICKS[:-1]), "more"])
    axis.minorticks_off()
    axis.set_xticks(range(len(_PATTERNS)), _PATTERNS, rotation=30, ha="right", fontsize=8)
    axis.legend(fontsize=8)


def _where(rows: Sequence[Row]) -> str:
    first, commits = rows[0], dict.fromkeys(row["commit"] for row in rows)
    return (
        f"{first['gpu']}, CUDA {first['cuda']}, torch {first['torch']}, transformers "
        f"{first['transformers']}, commit {', '.join(commits)}"
    )
