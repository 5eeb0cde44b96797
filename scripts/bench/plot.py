"""Plots of the committed results, from their CSV files alone. Needs matplotlib (extra `plots`).

python scripts/bench/plot.py    # writes a PNG beside each CSV
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from targets import CEILING_TFLOPS_AT_HALF, TARGET_PATTERN, product_target_of, target_of

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parent / "results"
OURS = "samoyeds"

Rows = list[dict[str, str]]


def rows_of(path: Path) -> Rows:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- one layer ------------------------------------------------------------------------------------


def plot_experts(rows: Rows) -> plt.Figure:
    """Times the best dense path, and share of the byte floor, over tokens; a column a model.

    After a rest, where a case was measured so too.
    """
    rows = rested(rows)
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(
        2, len(models), figsize=(4 * len(models), 7), squeeze=False, sharex=True, sharey="row"
    )
    for column, model in enumerate(models):
        speed, share = axes[:, column]
        ours = [row for row in rows if row["model"] == model and row["path"] == OURS]
        for pattern in dict.fromkeys(row["pattern"] for row in ours):
            points = sorted(
                (int(row["tokens"]), float(row["x_best_dense"]), float(row["share_of_floor"]))
                for row in ours
                if row["pattern"] == pattern
            )
            tokens, speedups, shares = zip(*points, strict=True)
            speed.plot(tokens, speedups, marker="o", markersize=3, label=pattern)
            share.plot(tokens, shares, marker="o", markersize=3, label=pattern)
        _draw_targets(speed, share, model, ours)
        speed.axhline(1, color="grey", linewidth=0.8)
        speed.set(title=model, xscale="log")
        share.set(xlabel="tokens", ylim=(0, 1.05))
    axes[0, 0].set_ylabel("x the best dense path")
    axes[1, 0].set_ylabel("share of the byte floor")
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(
        "One layer of experts, bf16: higher is better, - is the target at "
        f"{TARGET_PATTERN}; after a rest from 1024 tokens on\n{caption(rows)}",
        fontsize=10,
    )
    return figure


def rested(rows: Rows) -> Rows:
    """Of each case those after its longest rest."""
    longest: dict[tuple[str, str], int] = {}
    for row in rows:
        case = row["model"], row["tokens"]
        longest[case] = max(longest.get(case, 0), int(row["rest_ms"]))
    return [row for row in rows if int(row["rest_ms"]) == longest[row["model"], row["tokens"]]]


def _draw_targets(speed: plt.Axes, share: plt.Axes, model: str, ours: Rows) -> None:
    """Ticks where TARGET_PATTERN should be; a time is drawn as what it is beside the best dense."""
    best_us = {
        int(row["tokens"]): float(row["x_best_dense"]) * float(row["p50_us"]) for row in ours
    }
    for tokens in sorted(best_us):
        target = target_of(model, tokens, TARGET_PATTERN)
        if target is None:
            continue
        speedup = best_us[tokens] / (1e3 * target.time_ms) if target.time_ms else target.speedup
        if speedup:
            speed.plot(tokens, speedup, marker="_", color="black", markersize=14)
        if target.share:
            share.plot(tokens, target.share, marker="_", color="black", markersize=14)


# --- one product ----------------------------------------------------------------------------------

DENSE = ("cuBLAS", "F.grouped_mm")
KERNEL = " kernel"  # ends paths measured by their kernels alone
CEILINGS = {  # TFLOP/s of the dense product
    "ceiling of (1, 2, V)": 2 * CEILING_TFLOPS_AT_HALF,
    "ceiling of 2:4": CEILING_TFLOPS_AT_HALF,
}


def plot_ssmm(rows: Rows) -> plt.Figure:
    """TFLOP/s of the dense product after the longest rest, a group of bars a shape."""
    longest = max(int(row["rest_ms"]) for row in rows)
    rows = [row for row in rows if int(row["rest_ms"]) == longest]
    shapes = list(dict.fromkeys(_shape_of(row) for row in rows))
    figure, axis = plt.subplots(figsize=(13, 5.5))
    colors: dict[str, str] = {}
    first, ticks = 0, []
    for shape in shapes:
        count = _draw_product(axis, first, shape, rows, colors)
        ticks.append(first + (count - 1) / 2)
        first += count + 1
    _draw_ceilings(axis)
    for label, color in colors.items():
        axis.bar(0, 0, color=color, label=label)
    axis.set_xticks(ticks, shapes, fontsize=8)
    axis.set(xlabel="out features x tokens x in features (x experts)", ylabel="TFLOP/s")
    axis.legend(fontsize=8, ncols=3)
    figure.suptitle(
        "One matrix product, bf16, TFLOP/s of the dense one; pale: the matrix kernel alone; - is "
        f"the target beside dense; {longest} ms of rest before each replay\n{caption(rows)}",
        fontsize=10,
    )
    return figure


def _draw_product(
    axis: plt.Axes, first: int, shape: str, rows: Rows, colors: dict[str, str]
) -> int:
    """Bars from place ``first`` on, ours with the kernel alone pale behind it; how many."""
    rows = [row for row in rows if _shape_of(row) == shape]
    alone = {row["pattern"]: float(row["tflops"]) for row in rows if row["path"] == OURS + KERNEL}
    dense = next(float(row["tflops"]) for row in rows if row["path"] in DENSE)
    bars = [row for row in rows if not row["path"].endswith(KERNEL)]
    for place, row in enumerate(bars, first):
        color = colors.setdefault(_bar_label(row), f"C{len(colors)}")
        bar = axis.bar(place, float(row["tflops"]), width=0.9, color=color, zorder=2)
        axis.bar_label(bar, fmt="%.0f", fontsize=7, label_type="center")
        if row["path"] != OURS:
            continue
        axis.bar(place, alone.get(row["pattern"], 0), width=0.9, color=color, alpha=0.35)
        target = product_target_of(shape, row["pattern"])
        if target and target.dense:
            axis.plot(place, target.dense * dense, marker="_", color="black", markersize=18)
    return len(bars)


def _draw_ceilings(axis: plt.Axes) -> None:
    for (label, tflops), style in zip(CEILINGS.items(), ("--", ":"), strict=True):
        axis.axhline(tflops, color="black", linewidth=1, linestyle=style, label=label)
    axis.set_ylim(0, 1.25 * max(CEILINGS.values()))  # room for the legend


def _shape_of(row: dict[str, str]) -> str:
    sizes = [row["m"], row["n"], row["k"]] + ([row["groups"]] if row["groups"] != "1" else [])
    return "x".join(sizes)


def _bar_label(row: dict[str, str]) -> str:
    if row["path"] in DENSE:
        return "dense: " + " or ".join(DENSE)
    return f"{row['path']} {row['pattern']}"


# --- whole models ---------------------------------------------------------------------------------

PANELS = (  # title, phase, metric
    ("prefill of 4096 tokens, ms (lower is better)", "prefill", "p50_ms"),
    ("decode, tokens/s at each batch", "decode", "tokens_per_s"),
    ("largest batch at 4096 context", "batch", "largest_batch"),
    ("weights, GB (lower is better)", "make", "weights_gb"),
)


def plot_model(rows: Rows) -> plt.Figure:
    """A bar for each side, a panel for each measure; a row a model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(
        len(models), len(PANELS), figsize=(4 * len(PANELS), 3.4 * len(models)), squeeze=False
    )
    for model, line in zip(models, axes, strict=True):
        for axis, (title, phase, metric) in zip(line, PANELS, strict=True):
            shown = [
                row
                for row in rows
                if (row["model"], row["phase"], row["metric"]) == (model, phase, metric)
            ]
            _draw_bars(axis, shown)
            axis.set_title(title, fontsize=9)
        line[0].set_ylabel(model)
        handles, labels = line[0].get_legend_handles_labels()
        line[-1].legend(handles, labels, fontsize=7)
    figure.suptitle(f"Whole models, bf16, random weights\n{caption(rows)}", fontsize=10)
    return figure


def _draw_bars(axis: plt.Axes, rows: Rows) -> None:
    """Groups by batch, a bar for each side and pattern in them."""
    batches = sorted({row["batch"] for row in rows}, key=lambda text: int(text or 0))
    sides = list(dict.fromkeys((row["side"], row["pattern"], row["modules"]) for row in rows))
    for number, side in enumerate(sides):
        heights = {
            row["batch"]: float(row["value"])
            for row in rows
            if (row["side"], row["pattern"], row["modules"]) == side
        }
        places = [place + 0.3 * number for place, batch in enumerate(batches) if batch in heights]
        values = [heights[batch] for batch in batches if batch in heights]
        bars = axis.bar(places, values, width=0.28, label=" ".join(filter(None, side)))
        axis.bar_label(bars, fmt="%.4g", fontsize=7)
    axis.set_xticks([place + 0.15 for place in range(len(batches))], batches)
    if len(batches) > 1:
        axis.set(yscale="log", xlabel="batch")
    axis.margins(y=0.15)  # room for the numbers


# --- encoding -------------------------------------------------------------------------------------


def plot_encode(rows: Rows) -> plt.Figure:
    """Throughput of each step, a group of bars a shape and pattern."""
    cases = list(dict.fromkeys((row["shape"], row["pattern"]) for row in rows))
    steps = ("mask", "encode", "mask + encode", "decode")
    figure, axis = plt.subplots(figsize=(11, 4))
    for offset, step in enumerate(steps):
        speed = [
            float(row["mb_per_s"])
            for case in cases
            for row in rows
            if (row["shape"], row["pattern"]) == case and row["step"] == step
        ]
        axis.bar([i + offset * 0.2 for i in range(len(cases))], speed, width=0.2, label=step)
    axis.axhline(100, color="black", linewidth=1, label="required for mask + encode")
    axis.set_xticks([i + 0.3 for i in range(len(cases))], [f"{s}\n{p}" for s, p in cases])
    axis.set_ylabel("MB/s of dense bf16 weight")
    axis.legend(fontsize=8)
    first = rows[0]
    axis.set_title(
        f"{first['cpu']}, {first['threads']} threads, torch {first['torch']}, "
        f"commit {first['commit']}"
    )
    return figure


PLOTS: dict[str, Callable[[Rows], plt.Figure]] = {
    "experts_h200.csv": plot_experts,
    "ssmm_h200.csv": plot_ssmm,
    "model_h200.csv": plot_model,
    "encode_cpu.csv": plot_encode,
}


def caption(rows: Rows) -> str:
    """Where the numbers come from; several commits where rows were measured again."""
    first, commits = rows[0], dict.fromkeys(row["commit"] for row in rows)
    return (
        f"{first['gpu']}, CUDA {first['cuda']}, torch {first['torch']}, "
        f"transformers {first['transformers']}, commit {', '.join(commits)}"
    )


def main(argv: Sequence[str]) -> None:
    """Plot the given CSV files, which go by these names, or all that are there."""
    paths = [Path(text) for text in argv] or [RESULTS / name for name in PLOTS]
    for path in paths:
        if not argv and not path.exists():
            continue
        figure = PLOTS[path.name](rows_of(path))
        figure.tight_layout()
        figure.savefig(path.with_suffix(".png"), dpi=100)
        plt.close(figure)
        print(path.with_suffix(".png"))


if __name__ == "__main__":
    main(sys.argv[1:])
