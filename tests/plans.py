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
SLAB_ROWS = 128  # dense, that a warpgroup of the Hopper kernel computes: 64 kept ones, or 2 * 64
GROUP_WARPS = 4


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


class Product(NamedTuple):
    """What a plan is for: a weight ``[m, k]``."""

    v: int  # of (1, 2, V) or (3, 4, V); 0: N == M
    rows: int  # m
    cols: int  # k
    may_split: bool = False  # the down product
    slots: int = 1  # N of (1, 2, V) or (3, 4, V)

    @property
    def blocks(self) -> int:
        return -(-self.cols // BLOCK_COLS)

    @property
    def tiles(self) -> int:
        """Of 16 kept rows; each slot of a block has tiles of its own."""
        if not self.v:
            return -(-self.rows // 16)
        blocks_of_rows = self.rows // (self.slots + 1)
        return self.slots * -(-blocks_of_rows // 16)

    @property
    def is_stepped(self) -> bool:
        return self.v > 0 and self.slots == 3


class Instance(NamedTuple):
    """A compiled kernel, as variants.cuh names it."""

    m_frags: int  # fragments of 16 kept rows that a warp holds
    n_frags: int  # fragments of 8 tokens that a warp holds
    warps_m: int
    warps_n: int
    warps_k: int
    cluster: int = 1  # thread blocks that load tokens for each other

    def plan(self, stages: int, blocks_per_sm: int = 1, splits: int = 1) -> PlanNumbers:
        return PlanNumbers(*self[:5], stages, blocks_per_sm, splits, self.cluster)

    @property
    def is_hopper(self) -> bool:
        """The kernel on wgmma, the only one with clusters."""
        return self.cluster > 1

    @property
    def tokens(self) -> int:
        """Of a tile."""
        return 8 * self.n_frags * self.warps_n

    @property
    def needs_sm90a(self) -> bool:
        """Its accumulators take registers from the warps that load."""
        return self.m_frags * self.n_frags > (12 if self.is_stepped else 8)

    @property
    def is_stepped(self) -> bool:
        """For (3, 4, V) only: a warp holds all three slots of a block."""
        return self.m_frags % 3 == 0

    @property
    def most_blocks_per_sm(self) -> int:
        """As its registers allow."""
        return 1 if self.m_frags * self.n_frags > (6 if self.is_stepped else 4) else 2

    @property
    def is_short(self) -> bool:
        """The Hopper kernel with short tiles, whose results borrow no stage."""
        return self.is_hopper and self.n_frags < 24

    def most_tokens(self, product: Product) -> int:
        """Of a tile: where N = M the Hopper kernel has registers for more."""
        return 208 if self.is_hopper and product.v == 0 else self.tokens

    def stages(self, product: Product) -> range:
        """How many there may be; the Hopper kernel has its number compiled in."""
        if not self.is_hopper:
            return range(1, MAX_STAGES + 1)
        return range(3, 4) if product.v else range(2, 3)

    def parts(self, product: Product) -> int:
        """Of the rows, that different thread blocks or clusters compute."""
        if self.is_hopper:
            slabs = product.rows // SLAB_ROWS
            return -(-slabs // (self.warps_m // GROUP_WARPS * self.cluster))
        return -(-product.tiles // (self.m_frags * self.warps_m))

    def shared_bytes(self, stages: int, product: Product) -> int:
        """Of a thread block."""
        if self.is_hopper:
            return self._hopper_shared_bytes(product)
        # Pipeline, sums of the other parts of k, barriers, addresses.
        tiles = self.m_frags * self.warps_m
        stage = self.warps_k * (tiles * BLOCK_BYTES + self.tokens * TOKEN_BYTES)
        # A lane hands over two sums of each accumulator, but those that a block's slots share once.
        sums_of_rows = self.m_frags // 3 * 4 if self.is_stepped else self.m_frags * 2
        floats = 4 * sums_of_rows * self.n_frags
        sums = (WARPS - WARPS // self.warps_k) * floats * LANES * 4
        # What the instance of the largest tiles has beside these is held back from all.
        most_tokens = max(each.tokens for each in INSTANCES if not each.is_hopper)
        return stages * stage + sums + 2 * MAX_STAGES * 8 + most_tokens * 8

    def _hopper_shared_bytes(self, product: Product) -> int:
        """Pipeline with its barriers, staged results, and what aligns the tokens."""
        groups = self.warps_m // GROUP_WARPS
        kept_rows = SLAB_ROWS // 2 if product.v else SLAB_ROWS
        weights = groups * kept_rows // 16 * BLOCK_BYTES
        stage = self.most_tokens(product) * BLOCK_COLS * 2 + weights + 2 * 8
        stages = self.stages(product)[0]
        # 96 tokens, 64 columns of 2 bytes; twice where two stages leave room for it, and twice 64
        # where no stage is borrowed
        staged_tokens = 128 if self.is_short else 192 if stages == 2 else 96
        staged = groups * staged_tokens * BLOCK_COLS
        return stages * stage + staged + 1024


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


HOPPER = Instance(m_frags=1, n_frags=24, warps_m=8, warps_n=1, warps_k=1, cluster=2)
SHORT = HOPPER._replace(n_frags=22)


def compiled_instances() -> list[Instance]:
    table = VARIANTS.read_text()
    found = re.findall(r"SsmmShape<T,([\s\d,]+)>", table)
    instances = [Instance(*map(int, numbers.split(","))) for numbers in found]
    hopper = {"full_tiles<T>(),": HOPPER, "short_tiles<T>(),": SHORT}
    return instances + [instance for entry, instance in hopper.items() if entry in table]


INSTANCES = compiled_instances()


def broken_rules(plan: PlanNumbers, product: Product, gpu: Gpu) -> list[str]:
    """Why a plan must be refused, in words of the refusal; none: it must run."""
    instance = plan.instance
    if instance not in INSTANCES:
        return ["compiled kernel"]
    shared_bytes = instance.shared_bytes(plan.stages, product)
    rules = {
        "compute capability 9.0": not instance.needs_sm90a or gpu.capability == 90,
        "(3, 4, V)": instance.is_stepped == product.is_stepped,
        "blocks_per_sm": 1 <= plan.blocks_per_sm <= instance.most_blocks_per_sm,
        "bytes of shared memory": shared_bytes <= gpu.block_shared_bytes,
    }
    if instance.is_hopper:
        stages = instance.stages(product)[0]
        is_whole = product.rows % SLAB_ROWS == 0 and product.cols % BLOCK_COLS == 0
        rules["multiples of 128"] = is_whole
        rules[f"1 split and {stages} stages"] = (plan.splits, plan.stages) == (1, stages)
        rules["multiple of 128"] = not instance.is_short or (
            product.v > 0 and product.v % BLOCK_COLS == 0
        )
    else:
        # The largest have no registers left for rows that switch every 32 columns.
        is_short = instance.needs_sm90a and not instance.is_stepped
        rules["multiple of 64"] = not is_short or product.v % 64 == 0
        rules["stages"] = plan.stages in instance.stages(product)
        rules["splits"] = 1 <= plan.splits <= (product.blocks if product.may_split else 1)
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


def tokens_for_three_rounds(instance: Instance, product: Product, gpu: Gpu) -> int:
    """Tokens of which each thread block computes about three tiles, one after another."""
    slots = gpu.num_sms * instance.most_blocks_per_sm // instance.cluster
    return 3 * slots * instance.most_tokens(product) // instance.parts(product)
