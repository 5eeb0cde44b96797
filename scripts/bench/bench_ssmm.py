"""The matrix product alone, sparse beside cuBLAS, F.grouped_mm and cuSPARSELt: equal m, n and k.

    python scripts/bench/bench_ssmm.py               # everything, two minutes on an H200
    python scripts/bench/bench_ssmm.py --quick
    python scripts/bench/bench_ssmm.py --shapes 14336x4096x4096 5120x512x3584x64 --patterns 1:2:128

A shape is out features x tokens x in features; with a fourth number that many experts, each with
exactly so many tokens. Dense is cuBLAS, or F.grouped_mm on tokens already sorted. cuSPARSELt
computes 2:4 through its C API with a plan that was searched for (cusparselt.cu), its result by rows
or by columns, whichever is faster; its rows are left out without nvcc or its package, with which
torch comes.

Each path is measured twice. As an op: of ours that is routing, where there are experts, bringing
the tokens into the order that the kernel reads, and the product. Timing as in bench_experts.py: R
products in a CUDA graph, each with weights and tokens of its own, as many as it takes for the
weights at 1:2:128 to be four times the L2, which is flushed before each replay; the time is divided
by R. And by kernels alone, from the profiler: of ours the matrix kernel, of the others all there
are. Either way the paths of a shape run in turn, a replay of one after one of the other, so that
all of them meet the same card, whatever it has done before; first with a rest before each replay,
and then without (`rest_ms`), where large products come to the card's power limit. Speeds compare
times of the same way. bf16, random data, medians with p20 and p80. TFLOP/s count the dense product;
the ceiling is what sparse tensor cores reach with their weights in registers (targets.py).
`sm_clock_mhz` is the median of readings during the replays. Each sparse result is compared with the
dense product of the decoded weights, on the tokens that are timed (relative_error), so that no
wrong result is.

Writes scripts/bench/results/ssmm_h200.csv after each shape, in place of the rows measured again.
On a CPU (--device cpu) it runs tiny shapes in plain torch under a wall clock, to try the script.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cusparselt
import torch
from layers import Tokens, empty_cache
from products import Product, dense_step, relative_error, sparse_step
from record import gpu_machine, merge_rows
from targets import TARGET_PATTERN, ceiling_tflops, product_target_of
from timing import Clock, Run, Time, clocks_of

from samoyeds_hf import SparsityPattern
from samoyeds_hf.errors import BuildError

RESULTS = Path(__file__).parent / "results" / "ssmm_h200.csv"
KEY = ("m", "n", "k", "groups", "pattern", "path", "rest_ms")
MAX_RELATIVE_ERROR = 0.01  # both sides round to bf16 once

CASES = {  # shapes and their patterns
    "14336x4096x4096": (TARGET_PATTERN, "1:2:64", "1:2:32", "2:4", "3:4:64"),
    "4096x4096x14336": (TARGET_PATTERN,),
    "14336x1024x4096": (TARGET_PATTERN,),
    "28672x1024x4096": (TARGET_PATTERN,),
    "5120x512x3584x64": (TARGET_PATTERN,),  # the first product of Qwen2-57B
    "2816x256x2048x60": (TARGET_PATTERN,),  # and of Qwen1.5-MoE
}
QUICK = ("14336x1024x4096", "2816x256x2048x60")
TINY = ("128x64x256", "64x16x128x4")  # for a CPU

CUBLAS, GROUPED, CUSPARSELT, OURS = "cuBLAS", "F.grouped_mm", "cuSPARSELt", "samoyeds"
KERNEL = " kernel"  # at the end of a path: from the profiler
KERNEL_NAMES = ("hopper_kernel", "ssmm_kernel")
BY_COLUMNS = ", by columns"  # until it is known which of cuSPARSELt's two is faster


@dataclass(frozen=True)
class Measured:
    """One path of a product."""

    time: Time
    mhz: int | None = None
    error: float | None = None


Key = tuple[str, str]  # pattern, which is "" where it is dense, and path
Found = dict[Key, Measured]


@dataclass
class Case:
    """What is timed, and the relative error of its result."""

    steps: Sequence[Run]
    error: float | None = None


Measure = Callable[[Product, Mapping[Key, Case], Clock], Found]


# --- measuring ------------------------------------------------------------------------------------


def paths_of(
    product: Product, patterns: Sequence[str], device: torch.device, rival: Path | None
) -> dict[Key, Case]:
    """``rival`` is cuSPARSELt's library."""
    runs = product.num_runs(device)
    tokens = [product.random_tokens(device) for _ in range(runs)]
    dense = [dense_step(product, each, product.random_dense(device)) for each in tokens]
    paths = {("", dense_path(product)): Case(dense)}
    if rival and not product.is_grouped:
        sizes = (product.m, product.n, product.k, runs)
        try:
            for is_by_columns, end in ((False, ""), (True, BY_COLUMNS)):
                products = cusparselt.Products(rival, *sizes, is_by_columns=is_by_columns)
                paths["2:4", CUSPARSELT + end] = Case(products.steps())
        except RuntimeError as error:
            complain(f"{product} {CUSPARSELT}: not measured, {error}")
    for text in patterns:
        paths[text, OURS] = sparse_path(product, SparsityPattern.parse(text), tokens)
    return paths


def sparse_path(product: Product, pattern: SparsityPattern, tokens: Sequence[Tokens]) -> Case:
    """Its result is checked."""
    stored = [product.random_sparse(pattern, each.hidden.device) for each in tokens]
    pairs = zip(tokens, stored, strict=True)
    steps = [sparse_step(product, pattern, *pair) for pair in pairs]
    error = relative_error(product, pattern, tokens[0], stored[0], steps[0])
    if not error < MAX_RELATIVE_ERROR:
        raise SystemExit(
            f"{product} {pattern}: the relative error must be below {MAX_RELATIVE_ERROR}, found "
            f"{error:.3g}; wrong results are not timed."
        )
    return Case(steps, error)


def measure_ops(_: Product, paths: Mapping[Key, Case], clock: Clock) -> Found:
    turns = clock.in_turn([path.steps for path in paths.values()])
    return faster_rival(
        {
            key: Measured(turn.time, turn.mhz, path.error)
            for (key, path), turn in zip(paths.items(), turns, strict=True)
        }
    )


def measure_kernels(product: Product, paths: Mapping[Key, Case], clock: Clock) -> Found:
    times = clock.kernels_in_turn(
        [(path.steps, KERNEL_NAMES if name == OURS else ()) for (_, name), path in paths.items()]
    )
    found = faster_rival(
        {
            key: Measured(time, error=path.error)
            for (key, path), time in zip(paths.items(), times, strict=True)
            if time
        }
    )
    if not found:
        complain(f"{product}, kernels alone: not measured, the profiler saw other ones")
    return {(pattern, name + KERNEL): each for (pattern, name), each in found.items()}


def faster_rival(found: Found) -> Found:
    """cuSPARSELt's result by rows or by columns, whichever is faster, under its plain name."""
    rivals = [key for key in found if key[1].startswith(CUSPARSELT)]
    slower = sorted(rivals, key=lambda key: found[key].time.p50)[1:]
    return {
        (pattern, path.removesuffix(BY_COLUMNS)): each
        for (pattern, path), each in found.items()
        if (pattern, path) not in slower
    }


def dense_path(product: Product) -> str:
    return GROUPED if product.is_grouped else CUBLAS


def complain(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- rows -----------------------------------------------------------------------------------------


def row_of(
    product: Product, found: Found, pattern: str, path: str, rest_ms: int, runs: int
) -> dict:
    measured = found[pattern, path]
    time, tflops = measured.time, product.tflops(measured.time.p50)
    way = KERNEL if path.endswith(KERNEL) else ""
    bars = {
        "dense": found.get(("", dense_path(product) + way)),
        "cusparselt": found.get(("2:4", CUSPARSELT + way)),
        "target_pattern": found.get((TARGET_PATTERN, OURS + way)),
    }
    speeds = {name: bar and bar.time.p50 / time.p50 for name, bar in bars.items()}
    target = product_target_of(str(product), pattern) if path == OURS + way else None
    ceiling = ceiling_tflops(SparsityPattern.parse(pattern).density) if pattern else None
    return {
        "m": product.m,
        "n": product.n,
        "k": product.k,
        "groups": product.groups,
        "pattern": pattern,
        "path": path,
        "rest_ms": rest_ms,
        "includes": includes(product, path),
        "p20_us": f"{time.p20:.2f}",
        "p50_us": f"{time.p50:.2f}",
        "p80_us": f"{time.p80:.2f}",
        "tflops": f"{tflops:.1f}",
        "x_dense": number(speeds["dense"]),
        "x_cusparselt": number(speeds["cusparselt"]),
        f"x_{TARGET_PATTERN}": number(speeds["target_pattern"]),
        "share_of_ceiling": number(ceiling and tflops / ceiling),
        "target": str(target) if target else "",
        "met": {True: "yes", False: "no", None: ""}[target.is_met(speeds) if target else None],
        "runs": runs,
        "sm_clock_mhz": measured.mhz or "",
        "relative_error": "" if measured.error is None else f"{measured.error:.2e}",
    }


def includes(product: Product, path: str) -> str:
    op = "copy of the tokens, product"
    return {
        CUBLAS: "product",
        GROUPED: "product; tokens already sorted",
        CUSPARSELT: "product; plan searched before",
        OURS: f"routing, {op}" if product.is_grouped else op,
        OURS + KERNEL: "product; tokens already in its order",
    }[path if path == OURS + KERNEL else path.removesuffix(KERNEL)]


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def print_lines(product: Product, rest_ms: int, rows: Sequence[dict]) -> None:
    verdicts = {"yes": "met", "no": "MISSED", "": "not judged"}
    cells = [
        f"{row['path']} {row['pattern']} {row['p50_us']} us {row['tflops']} TF {row['x_dense']}x"
        + (f" {verdicts[row['met']]} ({row['target']})" if row["target"] else "")
        for row in rows
    ]
    print("\n    ".join([f"{product}, {rest_ms} ms of rest", *cells]), flush=True)


# --- command line ---------------------------------------------------------------------------------


def compile_rival(folder: Path, device: torch.device) -> Path | None:
    try:
        return cusparselt.compile_library(folder, device)
    except BuildError as error:
        complain(f"{CUSPARSELT}: not measured, {error}")
        return None


def cases_of(args: argparse.Namespace) -> dict[Product, Sequence[str]]:
    """Products and their patterns."""
    texts = TINY if args.device == "cpu" else QUICK if args.quick else CASES
    products = args.shapes or [Product.parse(text) for text in texts]
    return {each: args.patterns or CASES.get(str(each), (TARGET_PATTERN,)) for each in products}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", type=Product.parse)
    parser.add_argument("--patterns", nargs="+", default=None)
    parser.add_argument("--out", type=Path, default=None, help="other than the results' CSV")
    parser.add_argument("--quick", action="store_true", help="a few cases; no CSV without --out")
    parser.add_argument("--device", default="cuda", help="cpu: no CSV without --out")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = torch.device(args.device)
    is_cuda = device.type == "cuda"
    out = args.out or (RESULTS if is_cuda and not args.quick else None)
    torch.manual_seed(0)
    clocks = clocks_of(device, budget_ms=50 if args.quick else 600)
    columns = gpu_machine(device)
    print(f"{columns['gpu']}; kernels: {columns['kernels']}")

    def keep(product: Product, found: Found, rest_ms: int) -> None:
        rows = [row_of(product, found, *key, rest_ms, product.num_runs(device)) for key in found]
        print_lines(product, rest_ms, rows)
        if out:
            merge_rows(out, [{**row, **columns} for row in rows], KEY)

    def measure(product: Product, patterns: Sequence[str], measure_paths: Measure) -> None:
        paths = paths_of(product, patterns, device, rival)
        for rest_ms, clock in clocks.items():
            keep(product, measure_paths(product, paths, clock), rest_ms)
        del paths
        empty_cache(device)

    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        rival = compile_rival(Path(folder), device)
        cases = cases_of(args)
        for product, patterns in cases.items():
            measure(product, patterns, measure_ops)
        # The profiler comes last: what it leaves in the process could slow the times above.
        for product, patterns in cases.items() if is_cuda else ():
            measure(product, patterns, measure_kernels)
    print(f"written to {out}" if out else "not written")


if __name__ == "__main__":
    main()
