"""Products of the matrices of many experts, the same to the bit however many are worked on at once.

Each expert's product is a call of its own: the sizes fill a GPU, and a library that is given a
batch chooses other kernels, with other orders of summation, for other batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """fp32 products on a GPU take TF32 inputs (10 bits of mantissa), sums stay fp32.

    For products inside an iteration, whose rounding the iteration itself corrects. Elsewhere
    nothing changes. In coordinates where H has a unit diagonal, TF32 cost nothing that could be
    measured at K = 256 of a trained model, and under a tenth of the error at condition 2e7.
    """
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def multiply(
    a: torch.Tensor,  # [E, O, K]
    b: torch.Tensor,  # [E, K, N]
    out: torch.Tensor | None = None,  # [E, O, N]
) -> torch.Tensor:
    """``a @ b`` of each expert."""
    if out is None:
        out = a.new_empty(*a.shape[:2], b.shape[2])
    for left, right, product in zip(a, b, out, strict=True):
        torch.mm(left, right, out=product)
    return out


def add_product(
    out: torch.Tensor,  # [E, O, N]  changed in place
    a: torch.Tensor,  # [E, O, K]
    b: torch.Tensor,  # [E, K, N]
    alpha: float = 1.0,
) -> None:
    """``out += alpha * a @ b`` of each expert; ``out`` may be some columns of a larger tensor."""
    for left, right, total in zip(a, b, out, strict=True):
        total.addmm_(left, right, alpha=alpha)
