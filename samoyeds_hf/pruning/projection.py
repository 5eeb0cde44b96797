"""Exact projection of a matrix onto a pattern."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from samoyeds_hf.pattern import SparsityPattern

_GROUP = 4


def project(
    x: torch.Tensor,  # [rows, k]  floating, no NaN
    pattern: SparsityPattern,
) -> torch.Tensor:
    """The mask ``[rows, k]`` of the pattern for which ``x * mask`` is nearest to ``x``.

    Top 2 of every 4, then the sum of squares over each Sub-Row, then the N largest of each block:
    exact, because the choices are nested and the score is a sum. A method with another score
    hands over the root of it: ``W * sqrt(diag(H))`` for Wanda. Ties go to the lower position, and
    sums are in fp64 in a fixed order, on every device and for every way of batching, so that a
    mask can be made again.
    """
    rows, k = x.shape
    v = pattern.sub_row(k)
    # The four positions of all groups as four contiguous vectors: what follows runs on those.
    size = x.abs().reshape(-1, _GROUP)
    a, b, c, d = (size[:, position].contiguous() for position in range(_GROUP))
    keep = _top2_of_4(a, b, c, d)
    if pattern.n < pattern.m:
        groups = _two_largest_squared(a, b, c, d)
        blocks = groups.view(rows // pattern.m, pattern.m, k // v, v // _GROUP)
        sums = _sum_last(blocks)  # [rows/M, M, k/V]
        order = sums.sort(dim=1, descending=True, stable=True).indices
        kept = torch.zeros_like(sums, dtype=torch.bool)
        kept.scatter_(1, order[:, : pattern.n], True)
        kept_groups = kept.unsqueeze(-1).expand(blocks.shape).reshape(-1)
        keep = [kept_groups & kept_inside for kept_inside in keep]
    return torch.stack(keep, dim=-1).view(rows, k)


def _top2_of_4(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor
) -> list[torch.Tensor]:
    """Which of a, b, c, d are the two largest, elementwise; ties to the earlier one."""
    # xy: x outranks y, because x comes first and is not smaller; else y outranks x.
    ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d
    # Kept = outranks at least two of the other three: the majority of three bits.
    return [
        _majority(ab, ac, ad),
        _majority(~ab, bc, bd),
        _majority(~ac, ~bc, cd),
        _majority(~ad, ~bd, ~cd),
    ]


def _majority(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return (x & y) | (z & (x | y))


def _two_largest_squared(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor
) -> torch.Tensor:
    """Sum of squares of the two largest of a, b, c, d, elementwise in fp64."""
    # NOTE: squares in fp32 would overflow above 1e19, which bf16 and fp32 reach.
    high_ab, high_cd = torch.maximum(a, b), torch.maximum(c, d)
    first = torch.maximum(high_ab, high_cd).double()
    low = torch.maximum(torch.minimum(a, b), torch.minimum(c, d))
    second = torch.maximum(torch.minimum(high_ab, high_cd), low).double()
    return first * first + second * second


def _sum_last(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension by halving: the order of sum() depends on shape and device."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        folded = x[..., :half] + x[..., half : 2 * half]
        if x.shape[-1] % 2:
            folded[..., 0] += x[..., -1]
        x = folded
    return x.squeeze(-1)
