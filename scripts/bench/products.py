"""One product of real sizes, or the same one for each of some experts, with random data."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial

import torch
from layers import DTYPE, WEIGHT_STD, Tokens, copies_of, pack_or_exit, random_stored
from targets import TARGET_PATTERN
from timing import Run

from samoyeds_hf import SparsityPattern
from samoyeds_hf.format import SparseWeight, decode
from samoyeds_hf.ops import linear, moe_up
from samoyeds_hf.packed import PackedSpec
from samoyeds_hf.packed_ops import packed_linear, packed_up

CPU_RUNS = 2


@dataclass(frozen=True)
class Product:
    """Sizes of a product."""

    m: int  # out features
    n: int  # tokens of each expert
    k: int  # in features
    groups: int = 1  # experts

    @classmethod
    def parse(cls, text: str) -> Product:
        """``mxnxk``, and experts as a fourth number.

        Raises:
            ArgumentTypeError: it is neither, for argparse to report.
        """
        try:
            return cls(*(int(number) for number in text.split("x")))
        except (TypeError, ValueError):
            raise argparse.ArgumentTypeError(
                f"a shape is mxnxk or mxnxkxexperts, found {text!r}"
            ) from None

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}" + (f"x{self.groups}" if self.is_grouped else "")

    @property
    def is_grouped(self) -> bool:
        return self.groups > 1

    @property
    def weight_shape(self) -> tuple[int, int, int]:
        return self.groups, self.m, self.k

    def num_runs(self, device: torch.device) -> int:
        """How many to time together: the same for all paths, by the one with the fewest bytes."""
        pattern = SparsityPattern.parse(TARGET_PATTERN)
        num_bytes = self.groups * pattern.num_bytes(self.m, self.k, DTYPE.itemsize)
        return copies_of(num_bytes) if device.type == "cuda" else CPU_RUNS

    def tflops(self, time_us: float) -> float:
        """Of the dense product."""
        return 2 * self.groups * self.m * self.n * self.k / time_us / 1e6

    def random_tokens(self, device: torch.device) -> Tokens:
        """``n`` for each expert, one expert each, in random order."""
        count = self.groups * self.n
        return Tokens(
            hidden=torch.randn(count, self.k, device=device, dtype=DTYPE),
            top_k_index=(torch.randperm(count, device=device) % self.groups)[:, None],
            top_k_weights=torch.ones(count, 1, device=device, dtype=DTYPE),
            counts=[self.n] * self.groups,
            offsets=torch.arange(self.n, count + 1, self.n, device=device, dtype=torch.int32),
        )

    def random_dense(self, device: torch.device) -> torch.Tensor:
        """``[groups, m, k]``."""
        weight = torch.empty(self.weight_shape, dtype=DTYPE, device=device)
        return weight.normal_(std=WEIGHT_STD)

    def random_sparse(self, pattern: SparsityPattern, device: torch.device) -> SparseWeight:
        return random_stored(self.weight_shape, pattern, device)


def dense_step(
    product: Product,
    tokens: Tokens,
    weight: torch.Tensor,  # [groups, m, k]
) -> Run:
    """``[groups*n, m]``, sorted by expert: by cuBLAS, or ``F.grouped_mm``."""
    if not product.is_grouped:
        return partial(torch.matmul, tokens.hidden, weight[0].t())
    multiply, x = torch.nn.functional.grouped_mm, tokens.sorted_by_expert()
    return partial(multiply, x, weight.transpose(1, 2), offs=tokens.offsets)


def sparse_step(
    product: Product, pattern: SparsityPattern, tokens: Tokens, stored: SparseWeight
) -> Run:
    """``[groups*n, m]`` in the order of the tokens; packs the weight where kernels take it."""
    text, x, index = str(pattern), tokens.hidden, tokens.top_k_index
    if not x.is_cuda and product.is_grouped:
        return partial(moe_up, x, index, *stored, text)
    if not x.is_cuda:
        return partial(linear, x, *(tensor[0] for tensor in stored), text)
    spec = PackedSpec(*product.weight_shape, pattern, DTYPE, is_gate_up=product.is_grouped)
    packed = pack_or_exit(stored, spec)
    if product.is_grouped:
        return partial(packed_up, x, index, packed, product.m, text)
    return partial(packed_linear, x, packed, product.m, text)


def relative_error(
    product: Product, pattern: SparsityPattern, tokens: Tokens, stored: SparseWeight, step: Run
) -> float:
    """Of a sparse step against the dense one on the decoded weights."""
    order = tokens.top_k_index.flatten().argsort(stable=True)
    found = step()[order].float()
    expected = dense_step(product, tokens, decode(stored, pattern))().float()
    return float((found - expected).norm() / expected.norm())
