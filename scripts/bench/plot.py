"""Plots of the committed results, from their CSV files alone. Needs matplotlib (extra `plots`).

python scripts/bench/plot.py    # writes a PNG beside each CSV
"""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parent / "results"


def rows_of(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def plot_layer() -> None:
    """Time of one expert layer over tokens, a panel a model."""
    rows = rows_of("layer_cuda.csv")
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(1, len(models), figsize=(5 * len(models), 4), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for row in rows:
            if row["model"] == model:
                label = " ".join(filter(None, (row["path"], row["pattern"])))
                lines[label].append((int(row["tokens"]), float(row["p50_us"]) / 1e3))
        for label, points in lines.items():
            style = "-" if label.startswith("sparse") else "--"
            axis.plot(*zip(*points, strict=True), style, marker="o", label=label)
        axis.set(xscale="log", yscale="log", title=model, xlabel="tokens", ylabel="ms (median)")
        axis.legend(fontsize=8)
    first = rows[0]
    figure.suptitle(
        f"One expert layer, bf16, lower is better: {first['gpu']}, torch {first['torch']}, "
        f"transformers {first['transformers']}, commit {first['commit']}"
    )
    save(figure, "layer_cuda.png")


def plot_encode() -> None:
    """Throughput of each step, a group of bars a shape and pattern."""
    rows = rows_of("encode_cpu.csv")
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
    save(figure, "encode_cpu.png")


def save(figure: plt.Figure, name: str) -> None:
    figure.tight_layout()
    figure.savefig(RESULTS / name, dpi=100)
    plt.close(figure)
    print(RESULTS / name)


if __name__ == "__main__":
    plot_layer()
    plot_encode()
