"""ADMM: search for mask and weights together, by alternating least squares and projection."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from samoyeds_hf.pruning.products import add_product, fast_products
from samoyeds_hf.pruning.result import Found, row_losses
from samoyeds_hf.pruning.wanda import replace_failed

if TYPE_CHECKING:
    from samoyeds_hf.pruning.problem import Problem

RHO = 0.1  # penalty of the first step, where H has a unit diagonal
GROWTH = 1.04  # of rho, a step
STEPS = 90
HOLD = 9  # steps that share one rho, and so one inverse


def admm(problem: Problem) -> Found:
    """Prune with ADMM (ALPS, Meng et al. 2024) and the exact projection onto the pattern.

    ``X <- (W H + rho (Z-U)) (H + rho I)^-1``, ``Z <- Proj(X+U)``, ``U += X - Z``; when rho grows,
    U shrinks as much, for it is the dual variable over rho. X is had as ``W + (Z - U - W) P``
    with ``P = rho (H + rho I)^-1``, whose eigenvalues lie in 0..1: one product a step, and even
    bf16 inputs to it changed no error in the fourth digit. Z and U do not overlap, so that
    V = Z + U and the mask are all state.

    Where H is nearly diagonal the projection alone may be better: each block of rows takes it if
    it is. An expert whose H has no inverse gets Wanda's result and a note.
    """
    dense = problem.weight
    first = problem.project(dense)
    mask, state = first, dense.masked_fill(~first, 0)  # [E, O, K]  V
    inverse = torch.empty_like(problem.matrix)
    failed = torch.zeros(dense.shape[0], dtype=torch.bool, device=dense.device)
    for step in range(STEPS):
        dual = state.masked_fill(mask, 0)
        if step % HOLD == 0:
            failed |= _penalty_inverse(problem.matrix, RHO * GROWTH**step, inverse)
            if step:
                dual *= GROWTH**-HOLD
        difference = state.masked_fill_(~mask, 0).sub_(dual).sub_(dense)  # Z - U - W
        state = dual.add_(dense)
        with fast_products(dense.device):
            add_product(state, difference, inverse)
        mask = problem.project(state)
    del inverse, dual, difference
    state.masked_fill_(~mask | problem.dead, 0)
    result = replace_failed(problem, Found(mask, state, problem.notes), failed, "admm")
    return _or_projection(problem, first, result)


def _penalty_inverse(
    matrix: torch.Tensor,  # [E, K, K]
    rho: float,
    out: torch.Tensor,  # [E, K, K]
) -> torch.Tensor:
    """Write ``rho (H + rho I)^-1``; returns which experts have none, bool ``[E]``; theirs is 0."""
    failed = []
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for own, inverse in zip(matrix, out, strict=True):
        lower, info = torch.linalg.cholesky_ex(torch.add(own, eye, alpha=rho))
        # cholesky_inverse would take three times the operations in full fp32
        root = torch.linalg.solve_triangular(lower, eye, upper=False)
        with fast_products(matrix.device):
            torch.mm(root.mT, root, out=inverse)
        bad = (info != 0) | ~inverse.sum().isfinite()
        inverse.mul_(rho).masked_fill_(bad, 0)
        failed.append(bad)
    return torch.stack(failed)


def _or_projection(problem: Problem, mask: torch.Tensor, found: Found) -> Found:
    """What was found, or the projection where that loses no more, for each block of rows."""
    weight = found.weight if found.weight is not None else found.scaled(problem)
    plain = problem.weight.masked_fill(~mask, 0)
    blocks = (*weight.shape[:1], -1, problem.rows_together)
    lost, lost_plain = (row_losses(problem, q).view(blocks).sum(dim=-1) for q in (weight, plain))
    take = (lost_plain <= lost).repeat_interleave(problem.rows_together, dim=1).unsqueeze(-1)
    return Found(torch.where(take, mask, found.mask), torch.where(take, plain, weight), found.notes)
