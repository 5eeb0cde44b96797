"""Better weights for a mask, and better masks for those weights, in turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from samoyeds_hf.pattern import SparsityPattern
from samoyeds_hf.pruning.products import fast_products, multiply
from samoyeds_hf.pruning.result import Found, row_losses
from samoyeds_hf.pruning.swap import swap

if TYPE_CHECKING:
    from samoyeds_hf.pruning.problem import Problem

STEPS = 10  # of conjugate gradients, each time
ROUNDS = 2  # of local search


def refine(problem: Problem, found: Found, *, steps: int = STEPS, rounds: int = ROUNDS) -> Found:
    """Least squares on the mask, then ``rounds`` times local search and least squares again.

    Least squares: ``(Q H)_kept = (W H)_kept`` for each row (ALPS, Meng et al. 2024, section 3.3),
    by conjugate gradients over all rows at once, one product ``[E, O, K] x [E, K, K]`` a step.
    Local search: :func:`~samoyeds_hf.pruning.swap.swap`; for patterns that are not ours, the
    nearest mask to a gradient step, where that helps.

    In exact arithmetic no block of rows gets worse. The caller compares what is left of it after
    rounding.
    """
    weight, mask = found.scaled(problem), found.mask
    conjugate_gradients(problem, weight, mask, steps)
    if rounds:
        mask = mask.clone()
    for number in range(rounds):
        if isinstance(problem.pattern, SparsityPattern):
            swap(problem, problem.pattern, weight, mask)
            conjugate_gradients(problem, weight, mask, steps)
        else:
            _step_and_project(problem, weight, mask, steps, rate=number + 1)
    return Found(mask, weight, found.notes)


def conjugate_gradients(
    problem: Problem,
    weight: torch.Tensor,  # [E, O, K]  scaled Q, 0 outside the mask, changed in place
    mask: torch.Tensor,  # [E, O, K]
    steps: int,
) -> None:
    """Conjugate gradients on the kept weights; rows are independent systems.

    The diagonal is 1, so that Jacobi's preconditioner is none.
    """
    dropped = ~mask
    residual = multiply(problem.weight - weight, problem.matrix).masked_fill_(dropped, 0)
    direction = residual.clone()
    energy = residual.square().sum(dim=-1, keepdim=True)  # [E, O, 1]
    image = torch.empty_like(residual)
    with fast_products(weight.device):
        for _ in range(steps):
            multiply(direction, problem.matrix, out=image).masked_fill_(dropped, 0)
            length = _ratio(energy, (direction * image).sum(dim=-1, keepdim=True))
            weight.addcmul_(length, direction)
            residual.addcmul_(length, image, value=-1)
            before, energy = energy, residual.square().sum(dim=-1, keepdim=True)
            direction.mul_(_ratio(energy, before)).add_(residual)


def _ratio(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a / b, and 0 where b is not positive: a row that is solved stands still."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1), 0)


def _step_and_project(
    problem: Problem,
    weight: torch.Tensor,  # [E, O, K]  scaled Q, changed in place
    mask: torch.Tensor,  # [E, O, K]  changed in place
    steps: int,
    rate: float,
) -> None:
    """Iterative hard thresholding with least squares, kept for the blocks that it helps.

    Rate 1 is the step to the minimum in each weight alone; more looks further.
    """
    moved = multiply(problem.weight - weight, problem.matrix).mul_(rate).add_(weight)
    tried = problem.project(moved)
    moved.masked_fill_(~tried, 0)
    conjugate_gradients(problem, moved, tried, steps)
    blocks = (*weight.shape[:1], -1, problem.rows_together)
    now, then = (row_losses(problem, q).view(blocks).sum(dim=-1) for q in (moved, weight))
    helps = (now < then).repeat_interleave(problem.rows_together, dim=1).unsqueeze(-1)
    weight.copy_(torch.where(helps, moved, weight))
    mask.copy_(torch.where(helps, tried, mask))
