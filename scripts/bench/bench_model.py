"""Whole models on one GPU, dense and sparse: prefill, decode, batch, loading.

    python scripts/bench/bench_model.py --model mixtral-8x7b                      # both sides
    python scripts/bench/bench_model.py --model qwen1.5-moe --sides sparse --phases decode load

Real shapes, random weights made on the GPU. The dense side runs with transformers' experts
implementations, the sparse one (--pattern) with this package. Phases:

- prefill: one forward of 4096 tokens with a cache, not compiled, as generate's own; ms. The dense
  side with the better of grouped_mm and eager.
- decode: tokens/s of generate() with a static cache, which transformers compiles with CUDA graphs,
  after a prompt of 128 tokens, at each of --batches. A logits processor notes an event a step; the
  first 8 steps (compiling, recording) do not count, what generate does between forwards does. The
  dense side runs with grouped_mm or batched_mm, whichever is faster for one layer in a CUDA graph.
- batch: the largest batch whose static cache of 4096 positions fits and whose last position is
  decoded, found by bisection.
- load: a random converted checkpoint is written to --temporary, then from_pretrained onto the GPU
  is timed, with its files in the page cache. Packing is timed by itself, over all modules again.
  The peak is the allocator's while loading. Sparse only.

Each side runs in a process of its own. Every result is written to
scripts/bench/results/model_h200.csv when it is there, in place of the one before.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from model_memory import bench_batch, bench_load
from model_speed import bench_decode, bench_prefill
from random_models import CONFIGS, dense_model, make_config, sparse_model
from record import gpu_machine
from session import GROUPED, Session
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

RESULTS = Path(__file__).parent / "results" / "model_h200.csv"
PHASES = ("prefill", "decode", "batch", "load")
SIDES = ("dense", "sparse")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(CONFIGS), default="mixtral-8x7b")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES[:3]))
    parser.add_argument("--pattern", default="1:2:128")
    parser.add_argument("--modules", nargs="+", default=["experts"], help="or shared_experts too")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--prefill-tokens", type=int, default=4096)
    parser.add_argument("--new-tokens", type=int, default=72)
    parser.add_argument("--most", type=int, default=None, help="no larger batch is tried")
    parser.add_argument("--layers", type=int, default=None, help="fewer layers, to try the script")
    parser.add_argument("--temporary", type=Path, help="where the checkpoint is written")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--device", default="cuda")
    return parser.parse_args(argv)


def run_side(args: argparse.Namespace, side: str) -> None:
    device = torch.device(args.device)
    config = make_config(args.model, args.layers)
    session = Session(args, side, config, device, gpu_machine(device))
    torch.manual_seed(0)
    ALL_EXPERTS_FUNCTIONS.register(GROUPED, ALL_EXPERTS_FUNCTIONS["grouped_mm"])
    with torch.no_grad():
        if "load" in args.phases and side == "sparse":
            attempt("load", partial(bench_load, session))
        if not set(args.phases) - {"load"}:
            return
        seconds = session.stopwatch()
        make = dense_model if side == "dense" else partial(sparse_model, sparsity=session.sparsity)
        model = make(config, device=device)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        session.report("make", "random weights", seconds=seconds(), weights_gb=size / 1e9)
        if "prefill" in args.phases:
            attempt("prefill", partial(bench_prefill, session, model))
        if "batch" in args.phases:  # before decode, whose CUDA graphs hold memory
            attempt("batch", partial(bench_batch, session, model))
        for batch in args.batches if "decode" in args.phases else ():
            attempt(f"decode {batch}", partial(bench_decode, session, model, batch))


def attempt(name: str, phase: Callable[[], None]) -> None:
    """Run a phase; the others are still measured if it fails."""
    try:
        phase()
    except RuntimeError:
        print(f"{name} failed:", file=sys.stderr)
        traceback.print_exc()


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if len(args.sides) == 1:
        run_side(args, args.sides[0])
        return
    options = sys.argv[1:] if argv is None else argv
    for side in args.sides:  # the last --sides counts
        subprocess.run([sys.executable, __file__, *options, "--sides", side], check=False)


if __name__ == "__main__":
    main()
