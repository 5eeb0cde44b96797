"""What a method finds, and the error by which findings are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from samoyeds_hf.pruning.problem import Problem

Notes = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Pruned:
    """Pruned weights of E experts and what is known of them."""

    weight: torch.Tensor  # [E, O, K]  dtype of the dense weight, 0 outside the mask
    mask: torch.Tensor  # [E, O, K]  bool, exactly the pattern
    error: torch.Tensor  # [E]        fp64, tr((W-Q) H (W-Q)^T) / tr(W H W^T)
    notes: Notes  # a tuple an expert: fallbacks, raised damping, few tokens


@dataclass(frozen=True)
class Found:
    """Masks, and weights in the coordinates of a :class:`Problem`."""

    mask: torch.Tensor  # [E, O, K]  bool, exactly the pattern
    weight: torch.Tensor | None  # [E, O, K]  0 outside the mask; None keeps the weights as they are
    notes: Notes

    def scaled(self, problem: Problem) -> torch.Tensor:
        """The weights, in memory of their own, ``[E, O, K]``."""
        return (problem.weight if self.weight is None else self.weight).masked_fill(~self.mask, 0)


@dataclass(frozen=True)
class Settled:
    """Weights as they will be stored, and what they lose."""

    weight: torch.Tensor  # [E, O, K]  dtype of the dense weight, 0 outside the mask
    mask: torch.Tensor  # [E, O, K]  bool
    lost: torch.Tensor  # [E, O]  fp64, (W-Q) H (W-Q)^T of each row
    notes: Notes

    def pruned(self, problem: Problem) -> Pruned:
        """The result, with the error of each expert: 0 where W H is 0."""
        lost = self.lost.sum(dim=-1)
        total = row_losses(problem, None).sum(dim=-1)
        return Pruned(
            self.weight, self.mask, torch.where(total > 0, lost / total, lost), self.notes
        )


def row_losses(
    problem: Problem,
    weight: torch.Tensor | None,  # [E, O, K]  scaled; None is 0
) -> torch.Tensor:
    """``(W-Q) H (W-Q)^T`` of each row, ``[E, O]`` fp64; dead inputs count nothing."""
    rows = torch.empty(problem.weight.shape[:2], dtype=torch.float64, device=problem.weight.device)
    for expert, (dense, matrix) in enumerate(zip(problem.weight, problem.matrix, strict=True)):
        delta = dense if weight is None else dense - weight[expert]
        image = delta @ matrix
        rows[expert] = image.mul_(delta).sum(dim=-1, dtype=torch.float64).clamp(min=0)
    return rows


def settle(problem: Problem, found: Found) -> Settled:
    """Round to the dtype of the dense weight, and measure what was rounded."""
    gone = ~found.mask | problem.dead
    stored = torch.empty_like(problem.dense, memory_format=torch.contiguous_format)
    for expert, dense in enumerate(problem.dense):
        own = dense if found.weight is None else found.weight[expert] / problem.root[expert]
        stored[expert] = own.to(dense.dtype).masked_fill(gone[expert], 0)
    del gone
    rounded = stored.to(problem.weight.dtype, copy=True).mul_(problem.root)
    return Settled(stored, found.mask, row_losses(problem, rounded), found.notes)


def better(problem: Problem, first: Settled, second: Settled) -> Settled:
    """The better of two for each block of rows whose masks depend on each other.

    Other rows do not matter to a block: the loss is a sum over rows. Of equals, and where the
    second is NaN, the first.
    """
    experts, rows = first.lost.shape
    blocks = (experts, rows // problem.rows_together, problem.rows_together)
    take = second.lost.view(blocks).sum(dim=-1) < first.lost.view(blocks).sum(dim=-1)
    take = take.repeat_interleave(problem.rows_together, dim=1)  # [E, O]
    wide = take.unsqueeze(-1)
    taken = torch.stack((~take, take)).any(dim=-1).tolist()  # which of the two an expert has
    notes = tuple(
        tuple(dict.fromkeys((a if has_first else ()) + (b if has_second else ())))
        for a, b, has_first, has_second in zip(first.notes, second.notes, *taken, strict=True)
    )
    return Settled(
        torch.where(wide, second.weight, first.weight),
        torch.where(wide, second.mask, first.mask),
        torch.where(take, second.lost, first.lost),
        notes,
    )
