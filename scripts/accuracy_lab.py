"""How accurate is a model after pruning? Trains one, prunes it in many ways, and measures.

    python scripts/accuracy_lab.py run --data DIR --work /tmp/lab --csv results.csv --workers 5
    python scripts/accuracy_lab.py run ... --family qwen2_moe --seed 1 --patterns 1:2:32 2:4
    python scripts/accuracy_lab.py report results.csv        # the table, and results.png

DIR holds train_text/*.tar.xz, documents of which 5 % by file are held out, and eval/*.jsonl. The
trained model stays in --work and is taken from there when the settings are the same. Rows go to
the CSV file as they come; a cell whose row is there is not measured again, so a run that was
stopped goes on when it is called again. A small model leaves a GPU idle between kernels: with
--workers several processes share it, each with some of the cells. Seven of them needed 2.8 times
as long for a cell as one alone (H200), and under NVIDIA's MPS, `nvidia-cuda-mps-control -d`, which
lets them compute at the same time, 1.7 times. Runs for other seeds or families may share --work and
the CSV on other GPUs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from lab.cells import IDEAS, METHODS, PATHS, PATTERNS, RECOVERIES, Choice, cells, share_of
from lab.corpus import load_corpus
from lab.experiment import Laboratory, LabSettings
from lab.measure import load_task
from lab.results import Results, read_rows
from lab.session import describe, measure_cells
from lab.shape import FAMILIES, Shape
from lab.table import markdown
from lab.training import TrainSettings, load_or_train

from samoyeds_hf.pruning.distill_settings import TRAINED, DistillSettings


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Command line; the defaults are for one H200."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="table and plot of a result file")
    report.add_argument("csv", type=Path)
    report.add_argument("--plot", type=Path, help="default: beside the CSV file")
    run = commands.add_parser("run", help="train, prune and measure")
    _add_places(run)
    _add_model(run)
    _add_training(run)
    _add_cells(run)
    return parser.parse_args(argv)


def _add_places(run: argparse.ArgumentParser) -> None:
    run.add_argument("--data", type=Path, required=True)
    run.add_argument("--work", type=Path, required=True, help="tokens and trained models stay here")
    run.add_argument("--csv", type=Path, required=True)
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--workers", type=int, default=1, help="processes that share the device")
    run.add_argument("--worker", type=int, help=argparse.SUPPRESS)  # which of them this is
    run.add_argument("--seconds", type=float, default=float("inf"), help="of the whole run")
    run.add_argument("--text-bytes", type=int, default=1 << 40, help="of each split at most")
    run.add_argument("--vocab", type=int, default=8192)


def _add_model(run: argparse.ArgumentParser) -> None:
    run.add_argument("--family", choices=FAMILIES, default=FAMILIES[0])
    run.add_argument("--seed", type=int, default=0, help="of training, calibration and recovery")
    for name in ("layers", "hidden", "intermediate", "experts", "top-k", "context"):
        run.add_argument(f"--{name}", type=int, help="default: the family's")


def _add_training(run: argparse.ArgumentParser) -> None:
    run.add_argument("--steps", type=int, default=10**9)
    run.add_argument("--minutes", type=float, default=4.0, help="end the schedule earlier")
    run.add_argument("--batch", type=int, default=48, help="windows of a training step")
    run.add_argument("--lr", type=float, default=1e-3)
    run.add_argument("--weight-decay", type=float, default=0.1)
    run.add_argument("--dropout", type=float, default=0.1)
    run.add_argument("--validation-tokens", type=int, default=1 << 18)


def _add_cells(run: argparse.ArgumentParser) -> None:
    run.add_argument("--patterns", nargs="*", choices=PATTERNS, default=PATTERNS)
    run.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    run.add_argument("--recoveries", nargs="*", choices=RECOVERIES, default=RECOVERIES)
    run.add_argument("--ideas", nargs="*", choices=IDEAS, default=IDEAS)
    run.add_argument("--paths", nargs="*", choices=PATHS, default=PATHS)
    run.add_argument("--tasks", nargs="*", default=["arc_easy", "piqa"])
    run.add_argument("--questions", type=int, default=10**6, help="of each task at most")
    run.add_argument("--samples", type=int, default=256, help="calibration windows")
    run.add_argument("--prune-batch", type=int, default=32, help="calibration windows at once")
    run.add_argument("--eval-tokens", type=int, default=1 << 19, help="held out, at most")
    run.add_argument("--probe-tokens", type=int, default=1 << 16)
    run.add_argument("--share", type=float, default=0.06, help="of training tokens to distill on")
    usual = DistillSettings()
    run.add_argument("--distill-batch", type=int, default=usual.batch_size)
    run.add_argument("--distill-lr", type=float, default=usual.learning_rate)
    run.add_argument("--distill-hidden", type=float, default=usual.hidden_weight)
    run.add_argument("--distill-train", choices=TRAINED, default=usual.train)


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Train or load, then measure cell by cell; how many cells failed, or processes with some."""
    deadline = time.monotonic() + args.seconds
    device = torch.device(args.device)
    sizes = ("layers", "hidden", "intermediate", "experts", "top_k", "context")
    shape = Shape.make(args.family, **{name: getattr(args, name) for name in sizes})
    corpus = load_corpus(args.data, args.work, vocab=args.vocab, max_bytes=args.text_bytes)
    counts = ", ".join(f"{split} {len(stream):,}" for split, stream in corpus.streams.items())
    print(f"tokens: {counts}", flush=True)
    training = TrainSettings(
        args.steps,
        args.minutes,
        args.batch,
        args.lr,
        args.weight_decay,
        args.dropout,
        args.validation_tokens,
        args.seed,
    )
    trained = load_or_train(shape, corpus, training, args.work, device)
    if args.workers > 1 and args.worker is None:
        del trained  # its memory, for the others
        return share(argv, args.workers, deadline, args.csv)
    files = [args.data / "eval" / f"{name}.jsonl" for name in args.tasks]
    tasks = [load_task(file, corpus.tokenizer, shape.context, args.questions) for file in files]
    settings = LabSettings(
        samples=args.samples,
        eval_tokens=args.eval_tokens,
        probe_tokens=args.probe_tokens,
        batch=args.prune_batch,
        share=args.share,
        distill_batch=args.distill_batch,
        distill_lr=args.distill_lr,
        distill_hidden=args.distill_hidden,
        distill_train=args.distill_train,
        seed=args.seed,
    )
    lab = Laboratory(trained, corpus, tasks, settings)
    results = Results(args.csv, describe(shape, training, trained, settings))
    choice = Choice(*(tuple(getattr(args, name)) for name in Choice.names()))
    chosen = cells(choice)
    if args.worker is not None:
        return measure_cells(lab, results, share_of(chosen, args.worker, args.workers), deadline)
    failed = measure_cells(lab, results, chosen, deadline)
    print(markdown(read_rows(args.csv)))
    return failed


def share(argv: Sequence[str], workers: int, deadline: float, path: Path) -> int:
    """Measure with several processes; how many of them failed with something."""
    threads = max(1, (os.cpu_count() or 1) // workers)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    left = f"--seconds={max(0.0, deadline - time.monotonic())}"
    command = [sys.executable, str(Path(__file__).resolve()), *argv, left]
    running = [
        subprocess.Popen([*command, f"--worker={worker}"], env=environment)
        for worker in range(workers)
    ]
    failed = sum(process.wait() != 0 for process in running)
    if rows := read_rows(path):
        print(markdown(rows))
    return failed


def report(args: argparse.Namespace) -> int:
    """Print the table, draw the plot."""
    from lab.plot import plot  # matplotlib is an extra

    rows = read_rows(args.csv)
    print(markdown(rows))
    plot(rows, args.plot or args.csv.with_suffix(".png"))
    return 0


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0 if nothing failed."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    return min(report(args) if args.command == "report" else run(args, argv), 1)


if __name__ == "__main__":
    sys.exit(main())
