"""The plans that the kernel library takes: its instances, and the rules for everything else.

Worked out from what an instance needs, not asked of the library. No GPU is needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

VARIANTS = Path(__file__).parents[1] / "kernels" / "include" / "samoyeds" / "variants.cuh"
WARPS, LANES = 8, 32
MAX_STAGES = 8
BLOCK_COLS = 128
BLOCK_BYTES = 2320  # of 16 kept rows and 128 columns, see fragment.cuh
TOKEN_BYTES = 272  # 128 columns of a token, and 16 bytes more


class Gpu(NamedTuple):
    """What decides which plans run."""

    capability: int  # 10 * major + minor
    num_sms: int
    block_shared_bytes: int  # most that one thread block may have

    @classmethod
    def current(cls) -> Gpu:
        found = torch.cuda.get_device_properties(0)
        capability = found.major * 10 + found.minor
        return cls(capability, found.multi_processor_count, found.shared_memory_per_block_optin)


class Instance(NamedTuple):
    """A compiled kernel, as variants.cuh names it."""

    m_frags: int  # fragments of 16 kept rows that a warp holds
    n_frags: int  # fragments of 8 tokens that a warp holds
    warps_m: int
    warps_n: int
    warps_k: int
    cluster: int = 1  # thread blocks that load their weights together

    def plan(self, stages: int, blocks_per_sm: int = 1, splits: int = 1) -> PlanNumbers:
        return PlanNumbers(*self[:5], stages, blocks_per_sm, splits, self.cluster)

    @property
    def tiles_m(self) -> int:
        """Of 16 kept rows, that a thread block computes."""
        return self.m_frags * self.warps_m

    @property
    def tokens(self) -> int:
        """Of a tile."""
        return 8 * self.n_frags * self.warps_n

    @property
    def needs_sm90a(self) -> bool:
        """Its accumulators take registers from the warps that load."""
        return self.m_frags * self.n_frags > 8

    @property
    def most_blocks_per_sm(self) -> int:
        """As its registers allow."""
        return 1 if self.m_frags * self.n_frags > 4 else 2

    def shared_bytes(self, stages: int) -> int:
        """Of a thread block: pipeline, sums of the other parts of k, barriers, addresses."""
        stage = self.warps_k * (self.tiles_m * BLOCK_BYTES + self.tokens * TOKEN_BYTES)
        floats = 2 * 4 * self.m_frags * self.n_frags  # that a lane hands over
        sums = (WARPS - WARPS // self.warps_k) * floats * LANES * 4
        return stages * stage + sums + 2 * MAX_STAGES * 8 + self.tokens * 8


class PlanNumbers(NamedTuple):
    """A SamoyedsPlan: ``library.Plan(*numbers)``."""

    m_frags: int
    n_frags: int
    warps_m: int
    warps_n: int
    warps_k: int
    stages: int
    blocks_per_sm: int
    splits: int
    cluster: int

    @property
    def instance(self) -> Instance:
        return Instance(*self[:5], self.cluster)


class Product(NamedTuple):
    """What a plan is for."""

    v: int  # of (1, 2, V); 0: N == M
    cols: int  # k
    may_split: bool = False  # the down product

    @property
    def blocks(self) -> int:
        return -(-self.cols // BLOCK_COLS)


def compiled_instances() -> list[Instance]:
    found = re.findall(r"SsmmShape<T,([\s\d,]+)>", VARIANTS.read_text())
    return [Instance(*map(int, numbers.split(","))) for numbers in found]


INSTANCES = compiled_instances()


def broken_rules(plan: PlanNumbers, product: Product, gpu: Gpu) -> list[str]:
    """Why a plan must be refused, in words of the refusal; none: it must run."""
    instance = plan.instance
    if instance not in INSTANCES:
        return ["compiled kernel"]
    most_splits = product.blocks if product.may_split else 1
    rules = {
        "compute capability 9.0": not instance.needs_sm90a or gpu.capability == 90,
        # They have no registers left for rows that switch every 32 columns.
        "multiple of 64": not instance.needs_sm90a or product.v % 64 == 0,
        "stages": 1 <= plan.stages <= MAX_STAGES,
        "blocks_per_sm": 1 <= plan.blocks_per_sm <= instance.most_blocks_per_sm,
        "splits": 1 <= plan.splits <= most_splits,
        "bytes of shared memory": instance.shared_bytes(plan.stages) <= gpu.block_shared_bytes,
    }
    return [words for words, holds in rules.items() if not holds]


def plans_of(instance: Instance, blocks: int) -> Iterator[PlanNumbers]:
    """Every plan of an instance, and those one step beyond; ``blocks`` of 128 columns in k."""
    for stages in range(MAX_STAGES + 2):
        for blocks_per_sm in range(4):
            for splits in range(blocks + 2):
                yield instance.plan(stages, blocks_per_sm, splits)


def legal_plans(instance: Instance, product: Product, gpu: Gpu) -> list[PlanNumbers]:
    plans = plans_of(instance, product.blocks)
    return [plan for plan in plans if not broken_rules(plan, product, gpu)]


def tokens_for_three_rounds(instance: Instance, tiles: int, gpu: Gpu) -> int:
    """Tokens of which each thread block computes about three tiles, one after another.

    Args:
        instance: of the kernel.
        tiles: of 16 kept rows in the weight.
        gpu: that runs it.
    """
    parts = -(-tiles // instance.tiles_m)
    return 3 * gpu.num_sms * instance.most_blocks_per_sm * instance.tokens // parts
