"""Factors of inverse Hessians, in fp64, with damping that rises until they exist."""

from __future__ import annotations

import torch

DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0)  # shares of the unit diagonal


def inverse_factor(
    matrix: torch.Tensor,  # [E, K, K]  unit diagonal
) -> tuple[torch.Tensor, list[float | None]]:
    """Upper U ``[E, K, K]`` with ``U^T U = (H + damping I)^-1``, and the damping of each expert.

    Each expert gets the least damping of ``DAMPINGS`` that works; None says that none did, and its
    U is the identity. Computed in fp64, returned in the dtype of H. Waits for the GPU once for
    each damping that is tried. Memory: five ``[K, K]`` in fp64.
    """
    factor = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    factor = factor.repeat(matrix.shape[0], 1, 1)
    used: list[float | None] = [None] * matrix.shape[0]
    left = list(range(matrix.shape[0]))
    for damping in DAMPINGS:
        works = torch.stack([_factor(matrix[expert], damping, factor[expert]) for expert in left])
        good = dict(zip(left, works.tolist(), strict=True))
        for expert in left:
            used[expert] = damping if good[expert] else None
        left = [expert for expert in left if not good[expert]]
        if not left:
            break
    return factor, used


def _factor(matrix: torch.Tensor, damping: float, out: torch.Tensor) -> torch.Tensor:
    """Write U of one expert ``[K, K]`` where it exists; returns whether it does, on the device.

    No inverse is formed: with the order of the columns reversed, Cholesky gives H = R R^T with R
    upper, and U = R^-1.
    """
    damped = matrix.to(torch.float64, copy=True)
    damped.diagonal().add_(damping)
    lower, info = torch.linalg.cholesky_ex(damped.flip(-2, -1))
    eye = torch.eye(matrix.shape[-1], dtype=torch.float64, device=matrix.device)
    upper = torch.linalg.solve_triangular(lower.flip(-2, -1), eye, upper=True)
    works: torch.Tensor = (info == 0) & upper.sum().isfinite()
    out.copy_(torch.where(works, upper, out))
    return works
