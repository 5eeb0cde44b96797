"""Builds of the library beside each other: does a change of the kernels make layers faster?

    python scripts/bench/compare_builds.py before=old/libsamoyeds.so after=new/libsamoyeds.so
    ... a=x.so b=y.so,SOME_VARIABLE=8 --models qwen3-30b-a3b --tokens 1024 4096 --patterns 1:2:64

A build is a name, a library, and variables that are set where it runs. Each one has a process of
its own with the same layers, tokens and routing; the processes take turns, a replay each after the
same rest (scripts/bench/timing.py), in an order that changes, so that all of them meet the same
card: one that follows another on a warm card takes 2 to 4 % longer. Medians, and how many times as
long as the first. `bits` marks a build whose results are not those of the first, to the bit.

Nothing is written: what is committed comes from bench_experts.py and bench_ssmm.py. On a CPU
(--device cpu --shrink 16) plain torch runs, to try the script.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from statistics import median

import torch
from layers import SHAPES, Shape, num_runs, random_layer, random_tokens, sparse_layer
from record import gpu_machine
from timing import MIN_REPLAYS, RESTS_MS, Clock

from samoyeds_hf import SparsityPattern
from samoyeds_hf.library import LIBRARY_VARIABLE


@dataclass(frozen=True)
class Build:
    """A library, and what its process has in its environment beside it."""

    name: str
    variables: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> Build:
        """From ``name=library,VARIABLE=value,...``; without a library what the package finds.

        Raises:
            argparse.ArgumentTypeError: not of that form.
        """
        name, is_there, rest = text.partition("=")
        library, *more = rest.split(",")
        pairs = [part.partition("=") for part in more]
        if not name or not is_there or not all(key and equals for key, equals, _ in pairs):
            raise argparse.ArgumentTypeError(
                f"a build is name=library[,VARIABLE=value...], found {text!r}"
            )
        variables = {key: value for key, _, value in pairs}
        return cls(name, {LIBRARY_VARIABLE: library, **variables} if library else variables)


@dataclass(frozen=True)
class Case:
    """A layer and how many tokens it meets."""

    model: str
    num_tokens: int
    pattern: str
    shrink: int

    @property
    def shape(self) -> Shape:
        """Of the model, sizes divided."""
        whole, by = SHAPES[self.model], self.shrink
        experts = max(whole.top_k, whole.experts // by)
        return Shape(whole.hidden // by, whole.inner // by, experts, whole.top_k)

    @property
    def num_runs(self) -> int:
        """Copies of the layer in a replay: as many as the whole model's needs for cold weights."""
        pattern = SparsityPattern.parse(self.pattern)
        return num_runs(SHAPES[self.model], self.num_tokens, pattern)


def serve(connection: Connection, build: Build, device: str, rest_ms: int) -> None:
    """A build's process: for each case received a digest of results, then a time each time asked.

    Sends what went wrong instead, as an exception.
    """
    os.environ.update(build.variables)
    try:
        clock = Clock(torch.device(device), rest_s=rest_ms / 1e3)
        while (case := connection.recv()) is not None:
            with torch.no_grad():
                _serve_case(connection, clock, case)
    except (Exception, SystemExit) as error:
        connection.send(RuntimeError(f"{build.name}: {error}"))


def _serve_case(connection: Connection, clock: Clock, case: Case) -> None:
    torch.manual_seed(0)
    shape, pattern, device = case.shape, SparsityPattern.parse(case.pattern), clock.device
    steps = []
    for _ in range(case.num_runs):
        layer = sparse_layer(shape, pattern, random_layer(shape, pattern, device))
        steps.append(partial(layer, *random_tokens(shape, case.num_tokens, device).inputs))
    out = steps[0]().cpu().contiguous()
    connection.send(hashlib.sha256(out.view(torch.uint8).numpy().tobytes()).hexdigest())
    time_us = clock.recorded(steps)
    while connection.recv():
        connection.send(time_us())


@contextmanager
def processes(builds: Sequence[Build], device: str, rest_ms: int) -> Iterator[list[Connection]]:
    """One for each build, ended afterwards."""
    context = get_context("spawn")  # CUDA does not survive a fork
    running = []
    for build in builds:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, build, device, rest_ms), daemon=True)
        process.start()
        theirs.close()  # else a process that dies would be waited for
        running.append((ours, process))
    try:
        yield [connection for connection, _ in running]
    finally:
        for _, process in running:
            process.terminate()
            process.join()


def received(connection: Connection) -> object:
    """What a process sends; an exception that it sends is raised, EOFError where it has died."""
    found = connection.recv()
    if isinstance(found, Exception):
        raise found
    return found


def compare(case: Case, connections: Sequence[Connection], rounds: int) -> list[tuple[float, bool]]:
    """Microseconds of each build, and whether it makes the same bits as the first."""
    digests = []
    for connection in connections:  # one after the other: layers are made on the same GPU
        connection.send(case)
        digests.append(received(connection))
    times: list[list[float]] = [[] for _ in connections]
    for number in range(rounds):
        order = list(range(len(connections)))
        for i in order if number % 2 else order[::-1]:
            connections[i].send(True)
            time_us = received(connections[i])
            if number > 0:  # the first one records
                times[i].append(float(time_us))
    for connection in connections:
        connection.send(False)
    return [(median(t), d == digests[0]) for t, d in zip(times, digests, strict=True)]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("builds", nargs="+", type=Build.parse, metavar="NAME=LIBRARY[,VAR=VALUE]")
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 1024, 4096, 16384])
    parser.add_argument("--patterns", nargs="+", default=["1:2:128"])
    parser.add_argument("--rounds", type=int, default=MIN_REPLAYS, help="times that each is timed")
    parser.add_argument("--rest-ms", type=int, default=RESTS_MS[0], help="before each of them")
    parser.add_argument("--shrink", type=int, default=1, help="divide sizes, to try the script")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cases = [
        Case(model, tokens, pattern, args.shrink)
        for model in args.models
        for pattern in args.patterns
        for tokens in args.tokens
    ]
    machine = gpu_machine(torch.device(args.device))
    print(f"{machine['gpu']}, torch {machine['torch']}, {args.rest_ms} ms of rest")
    names = [build.name for build in args.builds]
    print(f"{'us':40}" + "".join(f"{name:>22}" for name in names))
    with processes(args.builds, args.device, args.rest_ms) as connections:
        for case in cases:
            found = compare(case, connections, args.rounds + 1)
            first = found[0][0]
            cells = (
                f"{us:10.1f} {us / first:6.3f}x {'' if is_same else 'bits'}".rjust(22)
                for us, is_same in found
            )
            label = f"{case.model} {case.pattern} T={case.num_tokens}"
            print(f"{label:40}" + "".join(cells), flush=True)
    print("bits: not the results of the first, to the bit")


if __name__ == "__main__":
    sys.exit(main())
