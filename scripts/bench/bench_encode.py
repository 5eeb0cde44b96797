"""How fast a dense bf16 weight becomes a sparse one on a CPU, and in how much memory.

    python scripts/bench/bench_encode.py                   # the shapes and patterns below
    python scripts/bench/bench_encode.py --shape 2048,768 --pattern 1:2:32 --repeats 9

Megabytes are those of the dense weight. `mask + encode` is what turns a dense weight into a sparse
one; the other steps are for comparison. Peak memory is the growth of the resident set of a fresh
process while it makes the weight, masks and encodes it, as a multiple of the weight's size: the
weight itself counts. Times are wall clock, the load average says how busy the machine was.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from record import machine

from samoyeds_hf import SparsityPattern, decode, encode, validate
from samoyeds_hf.pruning.magnitude import magnitude_mask

SHAPES = [(14336, 4096), (60, 2816, 2048)]  # Mixtral-8x7B w1; Qwen1.5-MoE gate_up_proj of a layer
PATTERNS = ["1:2:64", "1:2:128", "4:8:32", "2:4"]
STEPS = ["mask", "encode", "mask + encode", "decode", "validate"]
RESULTS = Path(__file__).parent / "results" / "encode_cpu.csv"

Shape = tuple[int, ...]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=shape_of, action="append", help="such as 60,2816,2048")
    parser.add_argument("--pattern", action="append", help="such as 1:2:64")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)  # the fresh process
    return parser.parse_args(argv)


def shape_of(text: str) -> Shape:
    return tuple(int(size) for size in text.split(","))


def make_weight(shape: Shape) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(generator=rng)


def time_steps(
    weight: torch.Tensor, pattern: SparsityPattern, repeats: int
) -> dict[str, list[float]]:
    """Seconds of each step, sorted."""
    seconds: dict[str, list[float]] = {step: [] for step in STEPS}
    for _ in range(repeats):
        ticks = [time.perf_counter()]
        mask = magnitude_mask(weight, pattern)
        ticks.append(time.perf_counter())
        stored = encode(weight, mask, pattern)
        ticks.append(time.perf_counter())
        decode(stored, pattern)
        ticks.append(time.perf_counter())
        validate(stored, pattern, weight.shape)
        ticks.append(time.perf_counter())
        seconds["mask + encode"].append(ticks[2] - ticks[0])
        for number, step in enumerate(["mask", "encode", "decode", "validate"]):
            seconds[step].append(ticks[number + 1] - ticks[number])
    return {step: sorted(times) for step, times in seconds.items()}


def memory_of_process(field: str) -> int:
    """Bytes: VmRSS resident now, VmHWM at most so far."""
    # NOTE: not getrusage(), whose peak starts at that of the process that started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith(field))
    return int(kilobytes) * 1024


def print_peak(shape: Shape, pattern: SparsityPattern) -> None:
    """Runs alone in a fresh process, because a peak cannot be taken back."""
    small = torch.ones(256, 4096, dtype=torch.bfloat16)  # libraries and scratch of the allocator
    encode(small, magnitude_mask(small, pattern), pattern)
    before = memory_of_process("VmRSS")
    weight = make_weight(shape)
    encode(weight, magnitude_mask(weight, pattern), pattern)
    peak = memory_of_process("VmHWM")
    print((peak - before) / (weight.numel() * weight.element_size()))


def measure_peak(shape: Shape, pattern: SparsityPattern, threads: int) -> float:
    size = ",".join(str(n) for n in shape)
    arguments = ["--peak", "--shape", size, "--pattern", str(pattern), "--threads", str(threads)]
    done = subprocess.run(
        [sys.executable, __file__, *arguments], check=True, capture_output=True, text=True
    )
    return float(done.stdout)


def bench(
    shape: Shape, pattern: SparsityPattern, repeats: int, threads: int
) -> list[dict[str, object]]:
    """A row for each step."""
    weight = make_weight(shape)
    dense_mb = weight.numel() * weight.element_size() / 1e6
    load = os.getloadavg()[0]
    times = time_steps(weight, pattern, repeats)
    del weight
    peak = measure_peak(shape, pattern, threads)
    rows: list[dict[str, object]] = []
    for step in STEPS:
        # of few repeats these are the nearest ranks
        p20, p50, p80 = (times[step][round(q * (repeats - 1))] for q in (0.2, 0.5, 0.8))
        rows.append(
            {
                "shape": "x".join(str(size) for size in shape),
                "dtype": "bfloat16",
                "pattern": str(pattern),
                "step": step,
                "threads": threads,
                "repeats": repeats,
                "p20_ms": round(p20 * 1e3, 2),
                "p50_ms": round(p50 * 1e3, 2),
                "p80_ms": round(p80 * 1e3, 2),
                "mb_per_s": round(dense_mb / p50, 1),
                "peak_x_dense": round(peak, 2) if step == "mask + encode" else "",
                "load": round(load, 2),
                **machine(),
            }
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    patterns = [SparsityPattern.parse(text) for text in args.pattern or PATTERNS]
    shapes = args.shape or SHAPES
    if args.peak:
        print_peak(shapes[0], patterns[0])
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{'shape':>14} {'pattern':>8} | MB/s of dense weight: {', '.join(STEPS)} | peak memory")
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        for number, (shape, pattern) in enumerate(itertools.product(shapes, patterns)):
            rows = bench(shape, pattern, args.repeats, args.threads)
            if number == 0:
                writer.writerow(rows[0])  # the names of the columns
            writer.writerows(row.values() for row in rows)
            file.flush()  # what is measured stays, also of a run that is stopped
            rates = " ".join(f"{row['mb_per_s']:>8}" for row in rows)
            peak = rows[STEPS.index("mask + encode")]["peak_x_dense"]
            print(f"{rows[0]['shape']:>14} {pattern!s:>8} | {rates} | {peak} x", flush=True)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
