"""One layer of experts, sparse beside every dense way to run it: the same tokens and experts.

    python scripts/bench/bench_experts.py             # everything, a few minutes on an H200
    python scripts/bench/bench_experts.py --quick
    python scripts/bench/bench_experts.py --models qwen3-30b-a3b --tokens 16 64 --patterns 1:2:128

Equal work: ours is the full expert forward with routing, gate and weighted sum over top-k, as one
op on packed weights. The dense paths stand beside it with what each includes; the best of them is
the bar, also where it does less (no routing, no gather, no weighted sum).

Timing (scripts/bench/timing.py): a CUDA graph holds R runs of the layer, each with weights, tokens
and routing of its own, and its time is divided by R. R is the same for every path of a case: as
many as it takes for the sparse weights of the experts hit to be 240 MB, four times the L2. The L2
is flushed before each replay. Random data, uniform routing, bf16; medians with p20 and p80.

The floor of a path is the time to read the weights of the experts hit once, at 4.3 TB/s (the copy
rate measured in the same run stands in each row); TFLOP/s count the dense products. `peak_mb` is
what one forward needs beyond its weights. At T = 16 each sparse layer is compared with
transformers' experts on the decoded weights (relative_error), so that no wrong result is timed.

Writes scripts/bench/results/experts_h200.csv after each model, in place of the rows measured again.
On a CPU (--device cpu) it runs the plain torch path under a wall clock, to try the script.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from layers import (
    FLOOR_BYTES_PER_S,
    SHAPES,
    Shape,
    SparseLayer,
    Tokens,
    cublas_loop,
    dense_layer,
    empty_cache,
    grouped_alone,
    num_runs,
    random_layer,
    random_tokens,
    relative_error,
    sparse_layer,
)
from record import gpu_machine, merge_rows
from targets import TARGET_PATTERN, target_of
from timing import Clock, Run, Time, copy_rate, peak_bytes

from samoyeds_hf import SparsityPattern

RESULTS = Path(__file__).parent / "results" / "experts_h200.csv"
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
PATTERNS = ("1:2:32", "1:2:64", "1:2:128", "2:4")
KEY = ("model", "tokens", "pattern", "path")

MAX_RELATIVE_ERROR = 0.02  # both sides round to bf16 after each product
CHECK_TOKENS = 16
BATCHED_PAIRS = 64  # batched_mm copies the weights of each pair's expert

OURS = "samoyeds"
FULL = "routing, gather, gate, weighted sum"
BARE = "gate; tokens already sorted"
INCLUDES = {
    "grouped_mm": FULL,
    "batched_mm": FULL,
    "F.grouped_mm alone": BARE,
    "cuBLAS loop": BARE + ", counts known to the host",
    OURS: FULL,
}


@dataclass(frozen=True)
class Case:
    """The tokens of each of the R runs."""

    model: str
    shape: Shape
    num_tokens: int
    tokens: list[Tokens]

    @property
    def mean_hit(self) -> float:
        """Experts with tokens, on average over the runs."""
        return sum(tokens.num_hit for tokens in self.tokens) / len(self.tokens)

    def row(
        self, path: str, pattern: SparsityPattern | None, time: Time, best_us: float
    ) -> dict[str, object]:
        floor_us = self.mean_hit * self.shape.expert_bytes(pattern) / FLOOR_BYTES_PER_S * 1e6
        shape = self.shape
        flop = 6 * self.num_tokens * shape.top_k * shape.hidden * shape.inner
        speedup, share = best_us / time.p50, floor_us / time.p50
        target = target_of(self.model, self.num_tokens, str(pattern))
        return {
            "model": self.model,
            "tokens": self.num_tokens,
            "pattern": str(pattern) if pattern else "",
            "path": path,
            "includes": INCLUDES[path],
            "p20_us": f"{time.p20:.2f}",
            "p50_us": f"{time.p50:.2f}",
            "p80_us": f"{time.p80:.2f}",
            "floor_us": f"{floor_us:.2f}",
            "share_of_floor": f"{share:.3f}",
            "tflops": f"{flop / time.p50 / 1e6:.1f}",
            "x_best_dense": f"{speedup:.3f}",
            "target": str(target) if target else "",
            "met": ("yes" if target.is_met(speedup, share, time.p50) else "no") if target else "",
            "runs": len(self.tokens),
            "experts_hit": f"{self.mean_hit:.1f}",
        }


def make_cases(model: str, shape: Shape, counts: Sequence[int], device: torch.device) -> list[Case]:
    pattern = SparsityPattern.parse(TARGET_PATTERN)
    return [
        Case(
            model,
            shape,
            count,
            [random_tokens(shape, count, device) for _ in range(num_runs(shape, count, pattern))],
        )
        for count in counts
    ]


def measure(clock: Clock, label: str, steps: Sequence[Run]) -> Time | None:
    """Time of a path, or None with the reason on stderr: the other paths are still measured."""
    try:
        return clock(steps)
    except (RuntimeError, NotImplementedError) as error:
        print(f"{label}: not measured, {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        return None


# --- dense ----------------------------------------------------------------------------------------


def measure_dense(case: Case, layers: Sequence[torch.nn.Module], clock: Clock) -> list[dict]:
    """A row for each dense path."""
    times: dict[str, Time] = {}
    peaks: dict[str, int] = {}
    pairs = list(zip(layers, case.tokens, strict=False))
    for path in ("grouped_mm", "batched_mm"):
        if path == "batched_mm" and case.num_tokens * case.shape.top_k > BATCHED_PAIRS:
            continue
        for layer in layers:
            layer.config._experts_implementation = path
        steps = [partial(layer, *tokens.inputs) for layer, tokens in pairs]
        if time := measure(clock, f"{case.model} T={case.num_tokens} {path}", steps):
            times[path] = time
            peaks[path] = peak_bytes(steps[0], clock.device)
    for path, make in (("F.grouped_mm alone", grouped_alone), ("cuBLAS loop", cublas_loop)):
        steps = [make(layer, tokens) for layer, tokens in pairs]
        if time := measure(clock, f"{case.model} T={case.num_tokens} {path}", steps):
            times[path] = time
    best_us = min(time.p50 for time in times.values())
    weights_mb = f"{case.shape.experts * case.shape.expert_bytes(None) / 1e6:.1f}"
    return [
        {
            **case.row(path, None, time, best_us),
            "weights_mb": weights_mb,
            "peak_mb": f"{peaks[path] / 1e6:.1f}" if path in peaks else "",
            "relative_error": "",
        }
        for path, time in times.items()
    ]


# --- sparse ---------------------------------------------------------------------------------------


def make_sparse(
    shape: Shape, pattern: SparsityPattern, count: int, device: torch.device
) -> tuple[list[SparseLayer], float]:
    """So many layers, and the relative error of the first."""
    layers, error = [], 0.0
    for _ in range(count):
        stored = random_layer(shape, pattern, device)
        layers.append(sparse_layer(shape, pattern, stored))
        if len(layers) == 1:
            tokens = random_tokens(shape, CHECK_TOKENS, device)
            error = relative_error(shape, layers[0], stored, tokens)
    return layers, error


def measure_sparse(
    case: Case, layers: Sequence[SparseLayer], error: float, best_us: float, clock: Clock
) -> dict | None:
    pattern = layers[0].pattern
    steps = [
        partial(layer, *tokens.inputs) for layer, tokens in zip(layers, case.tokens, strict=False)
    ]
    time = measure(clock, f"{case.model} T={case.num_tokens} {pattern}", steps)
    if time is None:
        return None
    return {
        **case.row(OURS, pattern, time, best_us),
        "weights_mb": f"{layers[0].num_bytes / 1e6:.1f}",
        "peak_mb": f"{peak_bytes(steps[0], clock.device) / 1e6:.1f}",
        "relative_error": f"{error:.2e}",
    }


def measure_model(
    model: str, counts: Sequence[int], patterns: Sequence[SparsityPattern], clock: Clock
) -> list[dict]:
    shape, device = SHAPES[model], clock.device
    cases = make_cases(model, shape, counts, device)
    most = max(len(case.tokens) for case in cases)
    dense = [dense_layer(shape, device) for _ in range(most)]
    rows = {case.num_tokens: measure_dense(case, dense, clock) for case in cases}
    del dense
    empty_cache(device)
    best = {count: best_of(dense_rows) for count, dense_rows in rows.items()}
    for pattern in patterns:
        layers, error = make_sparse(shape, pattern, most, device)
        if not error < MAX_RELATIVE_ERROR:
            raise SystemExit(
                f"{model} {pattern}: the relative error must be below {MAX_RELATIVE_ERROR}, found "
                f"{error:.3g}; wrong results are not timed."
            )
        for case in cases:
            row = measure_sparse(case, layers, error, best[case.num_tokens][0], clock)
            rows[case.num_tokens] += [row] if row else []
        del layers
        empty_cache(device)
    for count, (best_us, path) in best.items():
        print_line(model, count, best_us, path, [r for r in rows[count] if r["path"] == OURS])
    return [row for of_case in rows.values() for row in of_case]


def best_of(rows: Sequence[dict]) -> tuple[float, str]:
    return min((float(row["p50_us"]), row["path"]) for row in rows)


def print_line(model: str, count: int, best_us: float, path: str, rows: Sequence[dict]) -> None:
    cells = [
        f"{row['pattern']} {float(row['p50_us']):8.1f} us {float(row['x_best_dense']):5.2f}x "
        f"{float(row['share_of_floor']):4.0%}"
        for row in rows
    ]
    verdicts = {"yes": "met", "no": "MISSED"}
    met = [f"{verdicts[row['met']]} ({row['target']})" for row in rows if row["met"]]
    line = [f"{model:16} T={count:<5} best dense {best_us:8.1f} us ({path})", *cells, *met]
    print(" | ".join(line), flush=True)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=None)
    parser.add_argument("--patterns", nargs="+", default=None)
    parser.add_argument("--out", type=Path, default=None, help="other than the results' CSV")
    parser.add_argument("--quick", action="store_true", help="a few cases; no CSV without --out")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    counts = args.tokens or ((1, 16, 256, 4096) if args.quick else TOKENS)
    texts = args.patterns or ((TARGET_PATTERN,) if args.quick else PATTERNS)
    patterns = [SparsityPattern.parse(text) for text in texts]
    out = args.out or (None if args.quick else RESULTS)
    device = torch.device(args.device)
    torch.manual_seed(0)
    clock = Clock(device, budget_ms=10 if args.quick else 60)
    columns = gpu_machine(device)
    rate = copy_rate(device) / 1e12 if device.type == "cuda" else 0.0
    print(f"{columns['gpu']}, device copy {rate:.2f} TB/s; kernels: {columns['kernels']}")
    columns = {"copy_tb_per_s": f"{rate:.3f}", **columns}
    with torch.no_grad():
        for model in args.models:
            rows = measure_model(model, counts, patterns, clock)
            if out:
                merge_rows(out, [{**row, **columns} for row in rows], KEY)
    print(f"written to {out}" if out else "not written")


if __name__ == "__main__":
    main()
