"""The matrix kernel's own source on the CPU, instance by instance, against fp64.

host_gpu stands in for CUDA: threads take turns, and an instruction of a warp does what the PTX ISA
says. What is tested is everything but time: which bytes a thread reads, switches, adds and stores.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import fragment_emulation
import pytest
import torch
from helpers import random_mask, silu_gate
from plans import INSTANCES, Instance

from samoyeds_hf import SparsityPattern
from samoyeds_hf.format import SparseWeight, decode, encode

TESTS = Path(__file__).parent
INCLUDE = TESTS.parent / "kernels" / "include"
GATED, ROWS, PARTIAL = range(3)  # Output of args.cuh
MAX_GROUP = 8
BF16 = torch.bfloat16

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")


class Case(NamedTuple):
    """One product of a weight ``[E, rows, cols]``."""

    text: str
    rows: int
    cols: int
    output: int
    counts: tuple[int, ...] = ()  # of each expert, eighths of a tile of tokens; none: no routing
    is_gate_up: bool = False
    top_k: int = 1  # pairs that share a row of x
    splits: int = 1
    stages: int = 2
    is_early: bool = False


# More rows than a thread block takes at once, tails of rows and of tokens, k that ends in a block.
STEPPED = {
    "gate and up": Case("3:4:32", 2 * 296, 160, GATED, (11, 0, 3), True, top_k=2),
    "gate and up, few": Case("3:4:96", 2 * 16, 96, GATED, (0, 1), True, is_early=True),
    "splits of k": Case("3:4:64", 4 * 69, 5 * 128 + 64, PARTIAL, (5, 9), splits=3, stages=1),
    "one Sub-Row": Case("3:4:416", 4 * 17, 416, ROWS, (2, 2), top_k=2),
    "without routing": Case("3:4:128", 4 * 80, 384, ROWS),
    "a block across gate and up": Case("3:4:32", 2 * 42, 64, ROWS, (1, 8), True),
}
OTHERS = {
    "gate and up": Case("1:2:32", 2 * 296, 160, GATED, (11, 0, 3), True, top_k=2),
    "splits of k": Case("1:2:64", 4 * 69, 5 * 128 + 64, PARTIAL, (5, 9), splits=3, stages=1),
    "without routing": Case("2:4", 203, 136, ROWS),
    "whole blocks": Case("1:2:128", 4 * 80, 384, ROWS, (3,)),
}
EVERY_STEP = "1:2:32"  # switches too often for the largest instances, which have no kernel for it


@dataclass(frozen=True)
class Program:
    """An instance, compiled for the CPU."""

    instance: Instance
    path: Path

    def run(self, *numbers: int, data: bytes) -> bytes:
        command = [str(self.path), *(str(int(number)) for number in numbers)]
        done = subprocess.run(command, input=data, capture_output=True, check=False)
        assert done.returncode == 0, (numbers, done.stderr.decode())
        return done.stdout


def build(instance: Instance, has_bulk_copies: bool, folder: Path) -> Program:
    program = folder / "ssmm"
    shape = ",".join(map(str, instance[:5]))
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    flags += ["-Wno-switch", "-fsanitize=undefined", "-fno-sanitize-recover=all"]
    flags += [f"-DSHAPE={shape}", f"-I{TESTS / 'host_gpu'}", f"-I{INCLUDE}"]
    flags += ["-DHOST_BULK_COPIES"] * has_bulk_copies
    source = TESTS / "host_gpu" / "ssmm.cpp"
    subprocess.run(["g++", *flags, "-o", str(program), str(source)], check=True)
    return Program(instance, program)


def list_tiles(counts: list[int], tile_tokens: int) -> list[tuple[int, int, int, int]]:
    """As route() does: expert, first place, tokens, first tile of its group << 8 | tiles in it."""
    tiles: list[tuple[int, int, int, int]] = []
    first = 0
    for expert, count in enumerate(counts):
        sizes = [min(tile_tokens, count - start) for start in range(0, count, tile_tokens)]
        base = len(tiles)
        for number, size in enumerate(sizes):
            group = number // MAX_GROUP * MAX_GROUP
            in_group = min(MAX_GROUP, len(sizes) - group)
            place = first + number * tile_tokens
            tiles.append((expert, place, size, (base + group) << 8 | in_group))
        first += count
    return tiles


def random_weight(case: Case, experts: int, rng: torch.Generator) -> SparseWeight:
    pattern = SparsityPattern.parse(case.text)
    shape = (experts, case.rows, case.cols)
    weight = torch.randn(shape, generator=rng) / case.cols**0.5
    return encode(weight.to(BF16), random_mask(shape, pattern, rng), pattern)


def check(program: Program, case: Case, blocks: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    pattern, tile_tokens = SparsityPattern.parse(case.text), program.instance.tokens
    counts = [count * tile_tokens // 8 + count % 3 for count in case.counts]
    experts, routed = max(1, len(counts)), sum(counts)
    # Some pairs are in no expert's list: their rows stay as they are.
    num_pairs = routed + 2 * case.top_k - routed % case.top_k if counts else tile_tokens + 5
    num_rows = num_pairs // case.top_k
    stored = random_weight(case, experts, rng)
    x = torch.randn(num_rows, case.cols, generator=rng).to(BF16)
    pairs = torch.randperm(num_pairs, generator=rng).to(torch.int32) if counts else torch.tensor([])
    tiles = torch.tensor(list_tiles(counts, tile_tokens), dtype=torch.int32).reshape(-1, 4)
    packed = fragment_emulation.pack(stored, pattern, case.rows, case.is_gate_up)
    data = (packed, x.view(torch.int16), tiles, pairs)
    v = pattern.sub_row(case.cols)
    found = program.run(
        *(pattern.n, pattern.m, v, case.rows, case.cols, case.is_gate_up),
        *(experts, num_rows, num_pairs, case.top_k, len(tiles)),
        *(case.output, case.splits, case.stages, blocks, case.is_early),
        data=b"".join(tensor.numpy().tobytes() for tensor in data),
    )

    dense = decode(stored, pattern).double()
    expected = torch.full((num_pairs, case.rows), float("nan"), dtype=torch.float64)
    lists = pairs[:routed].long().split(counts) if counts else [torch.arange(num_pairs)]
    for expert, places in enumerate(lists):
        expected[places] = x[places // case.top_k].double() @ dense[expert].T
    if case.output == GATED:
        expected = silu_gate(expected)
    dtype = torch.float32 if case.output == PARTIAL else BF16
    ours = torch.frombuffer(bytearray(found), dtype=dtype).view(case.splits, *expected.shape)
    rounding = 1e-5 if case.output == PARTIAL else 2**-8
    torch.testing.assert_close(
        ours.double().sum(0), expected, rtol=rounding, atol=1e-5, equal_nan=True
    )


@pytest.mark.parametrize("copies", ["bulk", "async"])
@pytest.mark.parametrize("instance", INSTANCES, ids=lambda one: "x".join(map(str, one)))
def test_products(instance: Instance, copies: str, tmp_path: Path) -> None:
    if instance.is_hopper:
        pytest.skip("the Hopper kernel is another one")
    if instance.needs_sm90a and copies == "async":
        pytest.skip("runs where there are bulk copies")
    program = build(instance, copies == "bulk", tmp_path)
    for number, (name, case) in enumerate((STEPPED if instance.is_stepped else OTHERS).items()):
        if case.text == EVERY_STEP and instance.needs_sm90a:
            continue
        for blocks in (1, 3):
            print(name, case, blocks)
            check(program, case, blocks, seed=number)
