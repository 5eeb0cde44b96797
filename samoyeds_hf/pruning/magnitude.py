"""Magnitude pruning: keep what is large. Needs no data; the baseline of every other method."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from samoyeds_hf.chunks import rows_per_chunk
from samoyeds_hf.errors import CheckpointError
from samoyeds_hf.pruning.projection import project

if TYPE_CHECKING:
    from samoyeds_hf.pattern import SparsityPattern


def magnitude_mask(
    weight: torch.Tensor,  # [..., m, k]
    pattern: SparsityPattern,
    name: str = "weight",
) -> torch.Tensor:
    """The mask ``[..., m, k]`` with the smallest Frobenius error.

    Raises:
        PatternError: the pattern does not divide the shape.
        CheckpointError: a weight is NaN or infinite, so no choice would be meaningful.
    """
    rows, k = weight.shape[-2:]
    pattern.check_fits(rows, k, name)
    mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    flat_weight, flat_mask = weight.detach().reshape(-1, k), mask.view(-1, k)
    step = rows_per_chunk(pattern.m, k, weight.device)
    for start in range(0, flat_weight.shape[0], step):
        chunk = flat_weight[start : start + step].to(torch.float32)
        # max() hands on a NaN, and is much faster than isfinite() of everything.
        if not bool(torch.isfinite(chunk.abs().max())):
            row, column = (~torch.isfinite(chunk)).nonzero()[0].tolist()
            raise CheckpointError(
                f"{name} must be finite to be pruned, found {float(chunk[row, column])} in row "
                f"{(start + row) % rows} of matrix {(start + row) // rows}, column {column}; "
                "check the source checkpoint."
            )
        flat_mask[start : start + step] = project(chunk, pattern)
    return mask
