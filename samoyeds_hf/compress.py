"""Prune and encode weights, a matrix at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from samoyeds_hf.errors import CalibrationError
from samoyeds_hf.format import SparseWeight, encode
from samoyeds_hf.metrics import relative, squared_error
from samoyeds_hf.pattern import SparsityPattern
from samoyeds_hf.pruning import METHODS
from samoyeds_hf.pruning.magnitude import magnitude_mask
from samoyeds_hf.report import WeightReport


def compress(
    weight: torch.Tensor,  # [..., m, k]
    pattern: SparsityPattern,
    method: str,
    name: str,
) -> tuple[SparseWeight, WeightReport]:
    """Prune and encode one weight, a matrix at a time so that temporaries stay small."""
    stored: list[SparseWeight] = []
    error = norm = 0.0
    for dense in matrices_of(weight):
        sparse, squared, total = compress_matrix(dense, pattern, method, name)
        stored.append(sparse)
        error, norm = error + squared, norm + total
    # One matrix keeps its two dimensions; several are stacked as they were.
    lead = weight.shape[:-2]
    joined = SparseWeight(
        *(torch.stack(parts).view(*lead, *parts[0].shape) for parts in zip(*stored, strict=True))
    )
    report = WeightReport(
        name=name,
        shape=tuple(weight.shape),
        pattern=str(pattern),
        bytes_before=weight.numel() * weight.element_size(),
        bytes_after=joined.num_bytes,
        error=relative(error, norm),
    )
    return joined, report


def compress_matrix(
    dense: torch.Tensor,  # [m, k]
    pattern: SparsityPattern,
    method: str,
    name: str,
) -> tuple[SparseWeight, float, float]:
    """Prune and encode one matrix; also its squared error and squared norm.

    Raises:
        CalibrationError: a method that needs data, of which there is none here.
    """
    if METHODS[method].needs_calibration:
        raise CalibrationError(
            f"Method {method!r} needs calibration data, found none for {name}; convert with "
            "samoyeds convert --calibration, or patch_model(..., calibration=...)."
        )
    mask = magnitude_mask(dense, pattern, name)
    sparse = encode(dense, mask, pattern, name)
    return sparse, *squared_error(dense, sparse, pattern)


def matrices_of(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """The matrices ``[m, k]`` of a weight ``[..., m, k]``."""
    yield from weight.detach().reshape(-1, *weight.shape[-2:])
