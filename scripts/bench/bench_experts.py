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
is flushed before each replay. The paths of a case run in turn, a replay of one after one of the
other, so that all of them meet the same card, whatever it has done before; from 1024 tokens on
first with a rest before each replay, and then without (`rest_ms`), where many tokens come to the
card's power limit. Speeds compare times after the same rest. Random data, uniform routing, bf16;
medians with p20 and p80.

The floor of a path is the time to read the weights of the experts hit once, at 4.3 TB/s (the copy
rate measured in the same run stands in each row); TFLOP/s count the dense products. `peak_mb` is
what one forward needs beyond its weights. At T = 16 each sparse layer is compared with
transformers' experts on the decoded weights (relative_error), so that no wrong result is timed.

Writes scripts/bench/results/experts_h200.csv after each case, in place of the rows measured again.
On a CPU (--device cpu) it runs the plain torch path under a wall clock, to try the script.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
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
from timing import Clock, Run, Time, clocks_of, copy_rate, peak_bytes
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from samoyeds_hf import SparsityPattern

RESULTS = Path(__file__).parent / "results" / "experts_h200.csv"
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
PATTERNS = ("1:2:32", "1:2:64", "1:2:128", "2:4", "3:4:64")
KEY = ("model", "tokens", "pattern", "path", "rest_ms")
FIRST_RESTED = 1024  # tokens; with fewer the power limit is far

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

    def __str__(self) -> str:
        return f"{self.model} T={self.num_tokens}"

    @property
    def mean_hit(self) -> float:
        """Experts with tokens, on average over the runs."""
        return sum(tokens.num_hit for tokens in self.tokens) / len(self.tokens)


@dataclass(frozen=True)
class Way:
    """One way to run the layer: a step for each of the R runs."""

    path: str
    pattern: SparsityPattern | None
    steps: Sequence[Run]
    weight_bytes: int
    error: float | None = None  # relative, of the first copy

    def __str__(self) -> str:
        return f"{self.path} {self.pattern or ''}".rstrip()


@dataclass(frozen=True)
class Layers:
    """Copies of a model's layer, one for each run; the sparse ones by pattern."""

    dense: Sequence[MixtralExperts]
    sparse: Mapping[SparsityPattern, Sequence[SparseLayer]]
    errors: Mapping[SparsityPattern, float]


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


def make_layers(
    shape: Shape, patterns: Sequence[SparsityPattern], count: int, device: torch.device
) -> Layers:
    made = {pattern: make_sparse(shape, pattern, count, device) for pattern in patterns}
    return Layers(
        [dense_layer(shape, device) for _ in range(count)],
        {pattern: layers for pattern, (layers, _) in made.items()},
        {pattern: error for pattern, (_, error) in made.items()},
    )


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
    if not error < MAX_RELATIVE_ERROR:
        raise SystemExit(
            f"{shape} {pattern}: the relative error must be below {MAX_RELATIVE_ERROR}, found "
            f"{error:.3g}; wrong results are not timed."
        )
    return layers, error


# --- ways to run a layer --------------------------------------------------------------------------


def ways_of(case: Case, layers: Layers) -> list[Way]:
    """Those that run; of others the reason goes to stderr."""
    ways = dense_ways(case, layers.dense)
    for pattern, copies in layers.sparse.items():
        steps = [
            partial(layer, *tokens.inputs)
            for layer, tokens in zip(copies, case.tokens, strict=False)
        ]
        ways.append(Way(OURS, pattern, steps, copies[0].num_bytes, layers.errors[pattern]))
    return [way for way in ways if does_run(way, case)]


def dense_ways(case: Case, layers: Sequence[MixtralExperts]) -> list[Way]:
    pairs = list(zip(layers, case.tokens, strict=False))
    is_few = case.num_tokens * case.shape.top_k <= BATCHED_PAIRS
    steps: dict[str, list[Run]] = {
        path: [partial(run_as, path, layer, tokens) for layer, tokens in pairs]
        for path in ("grouped_mm", *(("batched_mm",) if is_few else ()))
    }
    steps["F.grouped_mm alone"] = [grouped_alone(layer, tokens) for layer, tokens in pairs]
    steps["cuBLAS loop"] = [cublas_loop(layer, tokens) for layer, tokens in pairs]
    weight_bytes = case.shape.experts * case.shape.expert_bytes(None)
    return [Way(path, None, runs, weight_bytes) for path, runs in steps.items()]


def run_as(implementation: str, layer: MixtralExperts, tokens: Tokens) -> torch.Tensor:
    layer.config._experts_implementation = implementation
    return layer(*tokens.inputs)


def does_run(way: Way, case: Case) -> bool:
    """If not, the others are still measured."""
    try:
        way.steps[0]()
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        print(f"{case} {way}: not measured, {reason}", file=sys.stderr, flush=True)
        return False
    return True


# --- measuring ------------------------------------------------------------------------------------


def measure_model(
    model: str,
    counts: Sequence[int],
    patterns: Sequence[SparsityPattern],
    clocks: Mapping[int, Clock],
    device: torch.device,
) -> Iterator[list[dict]]:
    """The rows of each case, as soon as they are there."""
    shape = SHAPES[model]
    cases = make_cases(model, shape, counts, device)
    layers = make_layers(shape, patterns, max(len(case.tokens) for case in cases), device)
    for case in cases:
        yield measure(case, layers, clocks)
        empty_cache(device)


def measure(case: Case, layers: Layers, clocks: Mapping[int, Clock]) -> list[dict]:
    """A row for each way after each rest."""
    ways, rows = ways_of(case, layers), []
    device = case.tokens[0].hidden.device
    peaks = {
        str(way): f"{peak_bytes(way.steps[0], device) / 1e6:.1f}"
        for way in ways
        if INCLUDES[way.path] == FULL
    }
    for rest_ms, clock in clocks.items():
        if rest_ms and case.num_tokens < FIRST_RESTED:
            continue
        times = [turns.time for turns in clock.in_turn([way.steps for way in ways])]
        pairs = list(zip(ways, times, strict=True))
        best_us, best = min((time.p50, way.path) for way, time in pairs if not way.pattern)
        found = [
            {**row_of(case, *pair, best_us), "rest_ms": rest_ms, "peak_mb": peaks.get(str(pair[0]))}
            for pair in pairs
        ]
        print_line(case, rest_ms, best_us, best, [row for row in found if row["path"] == OURS])
        rows += found
    return rows


def row_of(case: Case, way: Way, time: Time, best_us: float) -> dict[str, object]:
    shape, pattern = case.shape, way.pattern
    floor_us = case.mean_hit * shape.expert_bytes(pattern) / FLOOR_BYTES_PER_S * 1e6
    flop = 6 * case.num_tokens * shape.top_k * shape.hidden * shape.inner
    speedup, share = best_us / time.p50, floor_us / time.p50
    target = target_of(case.model, case.num_tokens, str(pattern))
    return {
        "model": case.model,
        "tokens": case.num_tokens,
        "pattern": str(pattern) if pattern else "",
        "path": way.path,
        "includes": INCLUDES[way.path],
        "p20_us": f"{time.p20:.2f}",
        "p50_us": f"{time.p50:.2f}",
        "p80_us": f"{time.p80:.2f}",
        "floor_us": f"{floor_us:.2f}",
        "share_of_floor": f"{share:.3f}",
        "tflops": f"{flop / time.p50 / 1e6:.1f}",
        "x_best_dense": f"{speedup:.3f}",
        "target": str(target) if target else "",
        "met": ("yes" if target.is_met(speedup, share, time.p50) else "no") if target else "",
        "runs": len(case.tokens),
        "experts_hit": f"{case.mean_hit:.1f}",
        "weights_mb": f"{way.weight_bytes / 1e6:.1f}",
        "relative_error": "" if way.error is None else f"{way.error:.2e}",
    }


def print_line(case: Case, rest_ms: int, best_us: float, path: str, rows: Sequence[dict]) -> None:
    cells = [
        f"{row['pattern']} {float(row['p50_us']):8.1f} us {float(row['x_best_dense']):5.2f}x "
        f"{float(row['share_of_floor']):4.0%}"
        for row in rows
    ]
    verdicts = {"yes": "met", "no": "MISSED"}
    met = [f"{verdicts[row['met']]} ({row['target']})" for row in rows if row["met"]]
    name = f"{case}, {rest_ms} ms of rest"
    print(
        " | ".join([f"{name:42} best dense {best_us:8.1f} us ({path})", *cells, *met]), flush=True
    )


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
    clocks = clocks_of(device, budget_ms=10 if args.quick else 60)
    columns = gpu_machine(device)
    rate = copy_rate(device) / 1e12 if device.type == "cuda" else 0.0
    print(f"{columns['gpu']}, device copy {rate:.2f} TB/s; kernels: {columns['kernels']}")
    columns = {"copy_tb_per_s": f"{rate:.3f}", **columns}
    with torch.no_grad():
        for model in args.models:
            for rows in measure_model(model, counts, patterns, clocks, device):
                if out:
                    merge_rows(out, [{**row, **columns} for row in rows], KEY)
    print(f"written to {out}" if out else "not written")


if __name__ == "__main__":
    main()
