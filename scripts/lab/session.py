"""Cell after cell until a deadline; rows are written as they come."""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence

from lab.cells import DENSE, Cell
from lab.experiment import Laboratory, LabSettings
from lab.results import Results, about
from lab.shape import Shape
from lab.training import Trained, TrainSettings

_UNKNOWN = 20.0  # seconds that a cell is taken to need before one of its kind was measured


def describe(
    shape: Shape, training: TrainSettings, trained: Trained, settings: LabSettings
) -> dict[str, object]:
    """The columns of a model, the same in all its rows."""
    return {
        "family": shape.family,
        "size": f"{shape.layers}x{shape.hidden}x{shape.intermediate}x{shape.experts}",
        "seed": settings.seed,
        "parameters": trained.parameters,
        "trained_tokens": trained.tokens,
        "epochs": f"{trained.epochs:.2f}",
        "trained_minutes": f"{trained.minutes:.2f}",
        "validation": f"{trained.validation:.5g}",
        "weights": trained.sha256,
        "training": (
            f"{trained.steps} x {training.batch} x {shape.context}, lr {training.lr:g}, weight "
            f"decay {training.weight_decay:g}, dropout {training.dropout:g}, vocabulary "
            f"{trained.model.config.vocab_size}"
        ),
        "calibration": f"{settings.samples} x {shape.context}",
    }


def measure_cells(lab: Laboratory, results: Results, cells: Sequence[Cell], deadline: float) -> int:
    """Measure what is not there yet, as far as time allows; how many cells failed."""
    failed, left = [], []
    where = about(lab.dense.device)
    for cell in (Cell(DENSE, DENSE), *cells):
        if cell in results:
            continue
        if time.monotonic() + results.seconds(cell, _UNKNOWN) > deadline:
            left.append(cell)
            continue
        try:
            values = lab.measure(cell)
        except Exception as error:  # whatever it is, the other cells are worth their time
            failed.append(cell)
            traceback.print_exc()
            print(f"FAILED {cell}: {type(error).__name__}: {error}", flush=True)
            continue
        results.add(cell, values, where)
        print(f"{cell}: {_line(values)}", flush=True)
    if left:
        print(f"no time for {len(left)} cells, the first: {left[0]}; call again to go on")
    if failed:
        print(f"{len(failed)} cells failed, the first: {failed[0]}")
    return len(failed)


def _line(values: dict[str, object]) -> str:
    shown = ("perplexity", "ratio", "kept", "prune_s", "recover_s", "measure_s", "seconds")
    return ", ".join(f"{name} {values[name]}" for name in shown if name in values)
