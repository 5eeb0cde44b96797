"""How far a sparse weight is from the dense one."""

from __future__ import annotations

import torch

from samoyeds_hf.chunks import rows_per_chunk
from samoyeds_hf.format import SparseWeight, decode
from samoyeds_hf.pattern import SparsityPattern


def squared_error(
    dense: torch.Tensor,  # [m, k]
    stored: SparseWeight,
    pattern: SparsityPattern,
) -> tuple[float, float]:
    """``(|W - decode|^2, |W|^2)`` in fp64, a few rows at a time so that temporaries stay small."""
    rows, k = dense.shape
    step = rows_per_chunk(pattern.m, k, dense.device)
    error = norm = 0.0
    for start in range(0, rows, step):
        kept = slice(pattern.kept_rows(start), pattern.kept_rows(min(start + step, rows)))
        sparse = decode(SparseWeight(*(tensor[kept] for tensor in stored)), pattern)
        chunk = dense[start : start + step].detach().double()
        norm += float(chunk.square().sum())
        error += float((chunk - sparse).square().sum())
    return error, norm


def relative(error: float, norm: float) -> float:
    """The relative Frobenius error from two squared sums; 0 for a zero weight."""
    return float((error / norm) ** 0.5) if norm else 0.0
