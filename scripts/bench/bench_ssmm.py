"""The matrix product alone, sparse beside cuBLAS, F.grouped_mm and cuSPARSELt: equal m, n and k.

    python scripts/bench/bench_ssmm.py               # everything, about a minute on an H200
    python scripts/bench/bench_ssmm.py --quick
    python scripts/bench/bench_ssmm.py --shapes 14336x4096x4096 5120x512x3584x64 --patterns 1:2:128

A shape is out features x tokens x in features; with a fourth number that many experts, each with
exactly so many tokens. Of ours there are two times: the whole op, which for experts routes, and
which brings the tokens into the order that its kernel reads; and its matrix kernel alone, from the
profiler. Dense is cuBLAS, or F.grouped_mm on tokens already sorted. cuSPARSELt computes 2:4 through
its C API with a plan that was searched for (cusparselt.cu); its rows are left out without nvcc or
its package, with which torch comes.

Timing as in bench_experts.py: R products in a CUDA graph, each with weights and tokens of its own,
as many as it takes for the weights at 1:2:128 to be four times the L2, which is flushed before each
replay; the time is divided by R. bf16, random data, medians with p20 and p80. TFLOP/s count the
dense product; the ceiling is what sparse tensor cores reach with their weights in registers
(targets.py). `sm_clock_mhz` is read while the same steps run on, right after they were timed. Each
sparse result is compared with the dense product of the decoded weights, on the tokens that are
timed (relative_error), so that no wrong result is.

Writes scripts/bench/results/ssmm_h200.csv after each shape, in place of the rows measured again.
On a CPU (--device cpu) it runs tiny shapes in plain torch under a wall clock, to try the script.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cusparselt
import torch
from layers import Tokens, empty_cache
from products import Product, dense_step, relative_error, sparse_step
from record import gpu_machine, merge_rows
from targets import TARGET_PATTERN, ceiling_tflops, product_target_of
from timing import Clock, Run, Time

from samoyeds_hf import SparsityPattern
from samoyeds_hf.errors import BuildError
from samoyeds_hf.format import SparseWeight

RESULTS = Path(__file__).parent / "results" / "ssmm_h200.csv"
KEY = ("m", "n", "k", "groups", "pattern", "path")
MAX_RELATIVE_ERROR = 0.01  # both sides round to bf16 once

CASES = {  # shapes and their patterns
    "14336x4096x4096": (TARGET_PATTERN, "1:2:64", "1:2:32", "2:4"),
    "4096x4096x14336": (TARGET_PATTERN,),
    "14336x1024x4096": (TARGET_PATTERN,),
    "28672x1024x4096": (TARGET_PATTERN,),
    "5120x512x3584x64": (TARGET_PATTERN,),  # the first product of Qwen2-57B
    "2816x256x2048x60": (TARGET_PATTERN,),  # and of Qwen1.5-MoE
}
QUICK = ("14336x1024x4096", "2816x256x2048x60")
TINY = ("128x64x256", "64x16x128x4")  # for a CPU

CUBLAS, GROUPED, CUSPARSELT = "cuBLAS", "F.grouped_mm", "cuSPARSELt"
OP, KERNEL = "samoyeds", "samoyeds kernel"
KERNEL_NAMES = ("hopper_kernel", "ssmm_kernel")


@dataclass(frozen=True)
class Measured:
    """One path of a product."""

    time: Time
    mhz: int | None = None
    error: float | None = None


Found = dict[tuple[str, str], Measured]  # by pattern, which is "" where it is dense, and path


# --- measuring ------------------------------------------------------------------------------------


def measure_product(
    product: Product, patterns: Sequence[str], clock: Clock, rival: Path | None
) -> Found:
    """All paths but the kernels alone; ``rival`` is cuSPARSELt's program."""
    runs = product.num_runs(clock.device)
    tokens = [product.random_tokens(clock.device) for _ in range(runs)]
    found = {("", dense_path(product)): measure_dense(product, tokens, clock)}
    if rival and not product.is_grouped:
        try:
            time = cusparselt.measure(rival, product.m, product.n, product.k, runs)
            found["2:4", CUSPARSELT] = Measured(time)
        except RuntimeError as error:
            complain(f"{product} {CUSPARSELT}: not measured, {error}")
    for text in patterns:
        empty_cache(clock.device)
        found[text, OP] = measure_sparse(product, SparsityPattern.parse(text), tokens, clock)
    return found


def measure_dense(product: Product, tokens: Sequence[Tokens], clock: Clock) -> Measured:
    steps = [dense_step(product, each, product.random_dense(clock.device)) for each in tokens]
    time = clock(steps)
    return Measured(time, clock.mhz(steps, time.p50))


def measure_sparse(
    product: Product, pattern: SparsityPattern, tokens: Sequence[Tokens], clock: Clock
) -> Measured:
    """The whole op."""
    steps, stored = sparse_steps(product, pattern, tokens)
    error = relative_error(product, pattern, tokens[0], stored, steps[0])
    if not error < MAX_RELATIVE_ERROR:
        raise SystemExit(
            f"{product} {pattern}: the relative error must be below {MAX_RELATIVE_ERROR}, found "
            f"{error:.3g}; wrong results are not timed."
        )
    time = clock(steps)
    return Measured(time, clock.mhz(steps, time.p50), error)


def sparse_steps(
    product: Product, pattern: SparsityPattern, tokens: Sequence[Tokens]
) -> tuple[list[Run], SparseWeight]:
    """Steps with weights of their own, and the weight of the first."""
    stored = [product.random_sparse(pattern, each.hidden.device) for each in tokens]
    pairs = zip(tokens, stored, strict=True)
    return [sparse_step(product, pattern, *pair) for pair in pairs], stored[0]


def measure_kernels(product: Product, found: Found, clock: Clock) -> Found:
    """The matrix kernel alone, for each pattern found."""
    tokens = [product.random_tokens(clock.device) for _ in range(product.num_runs(clock.device))]
    alone: Found = {}
    for text in [pattern for pattern, path in found if path == OP]:
        empty_cache(clock.device)
        steps, _ = sparse_steps(product, SparsityPattern.parse(text), tokens)
        op = found[text, OP]
        if time := clock.kernel(steps, KERNEL_NAMES):
            alone[text, KERNEL] = Measured(time, clock.mhz(steps, op.time.p50), op.error)
        else:
            complain(f"{product} {text} {KERNEL}: not measured, the profiler saw none")
    return alone


def dense_path(product: Product) -> str:
    return GROUPED if product.is_grouped else CUBLAS


def complain(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- rows -----------------------------------------------------------------------------------------


def row_of(product: Product, found: Found, pattern: str, path: str, runs: int) -> dict:
    measured = found[pattern, path]
    time, tflops = measured.time, product.tflops(measured.time.p50)
    bars = {
        "dense": found["", dense_path(product)],
        "cusparselt": found.get(("2:4", CUSPARSELT)),
        "target_pattern": found.get((TARGET_PATTERN, path)),
    }
    speeds = {name: bar and bar.time.p50 / time.p50 for name, bar in bars.items()}
    target = product_target_of(str(product), pattern) if path in (OP, KERNEL) else None
    ceiling = ceiling_tflops(SparsityPattern.parse(pattern).density) if pattern else None
    return {
        "m": product.m,
        "n": product.n,
        "k": product.k,
        "groups": product.groups,
        "pattern": pattern,
        "path": path,
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
        OP: f"routing, {op}" if product.is_grouped else op,
        KERNEL: "product; tokens already in its order",
    }[path]


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def print_line(product: Product, rows: Sequence[dict]) -> None:
    verdicts = {"yes": "met", "no": "MISSED", "": "not judged"}
    cells = [
        f"{row['path']} {row['pattern']} {row['p50_us']} us {row['tflops']} TF {row['x_dense']}x"
        + (f" {verdicts[row['met']]} ({row['target']})" if row["target"] else "")
        for row in rows
    ]
    print("\n    ".join([str(product), *cells]), flush=True)


# --- command line ---------------------------------------------------------------------------------


def compile_rival(folder: Path, device: torch.device) -> Path | None:
    try:
        return cusparselt.compile_program(folder, device)
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
    clock = Clock(device, budget_ms=10 if args.quick else 60)
    columns = gpu_machine(device)
    print(f"{columns['gpu']}; kernels: {columns['kernels']}")

    def keep(product: Product, new: Found, found: Found) -> None:
        rows = [row_of(product, found, *key, product.num_runs(device)) for key in new]
        print_line(product, rows)
        if out:
            merge_rows(out, [{**row, **columns} for row in rows], KEY)

    all_found: dict[Product, Found] = {}
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        rival = compile_rival(Path(folder), device)
        for product, patterns in cases_of(args).items():
            all_found[product] = found = measure_product(product, patterns, clock, rival)
            keep(product, found, found)
        # The profiler comes last: what it leaves in the process could slow the times above.
        for product, found in all_found.items() if is_cuda else ():
            alone = measure_kernels(product, found, clock)
            keep(product, alone, found | alone)
    print(f"written to {out}" if out else "not written")


if __name__ == "__main__":
    main()
