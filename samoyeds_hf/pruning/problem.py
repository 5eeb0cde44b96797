"""What all methods work on: weights in coordinates where every input is equally loud."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from samoyeds_hf.chunks import rows_per_chunk
from samoyeds_hf.errors import CalibrationError, CheckpointError
from samoyeds_hf.pattern import SparsityPattern
from samoyeds_hf.pruning.projection import project

if TYPE_CHECKING:
    from samoyeds_hf.pruning.moments import Hessian


class PatternLike(Protocol):
    """What methods ask of a pattern that is not a :class:`~samoyeds_hf.SparsityPattern`.

    Such patterns exist to compare masks; nothing stores or runs them.
    """

    @property
    def m(self) -> int:
        """Rows whose masks depend on each other: blocks of so many rows are apart."""

    def sub_row(self, k: int) -> int:
        """Columns whose masks depend on each other, of a weight with k in features."""

    def check_fits(self, rows: int, k: int, name: str = "weight") -> None:
        """Refuse a weight ``[rows, k]`` that the pattern does not divide, by PatternError."""

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """The mask ``[rows, k]`` for which ``x * mask`` is nearest to x, or near to it.

        Called with whole blocks of rows, and with k or ``sub_row(k)`` columns.
        """


@dataclass(frozen=True)
class Problem:
    """Weights to prune and their loss ``tr((W-Q) H (W-Q)^T)``, scaled so that H_jj = 1.

    In these coordinates damping and penalties mean the same for quiet and for loud inputs, and
    products may be rounded more. Scaled weights are ``W * root``.
    """

    dense: torch.Tensor  # [E, O, K]  as given
    pattern: SparsityPattern | PatternLike
    weight: torch.Tensor  # [E, O, K]  scaled, in the dtype of H; 0 at dead inputs
    matrix: torch.Tensor  # [E, K, K]  scaled H
    root: torch.Tensor  # [E, 1, K]  sqrt(H_jj)
    dead: torch.Tensor  # [E, 1, K]  bool: inputs that were always 0
    notes: tuple[tuple[str, ...], ...]  # a tuple an expert

    @classmethod
    def of(
        cls,
        weight: torch.Tensor,  # [E, O, K]
        pattern: SparsityPattern | PatternLike,
        hessian: Hessian,
    ) -> Problem:
        """Scale what :func:`check` let through."""
        dense = weight.detach()
        root = hessian.diagonal.sqrt().unsqueeze(-2)
        dead = hessian.dead.unsqueeze(-2)
        matrix = hessian.matrix / root
        matrix /= root.mT
        scaled = dense.to(root.dtype, copy=True).mul_(root).masked_fill_(dead, 0)
        return cls(dense, pattern, scaled, matrix, root, dead, hessian.notes)

    @property
    def rows_together(self) -> int:
        """Rows of a block whose masks depend on each other."""
        return self.pattern.m

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """The nearest mask of the pattern for ``x [E, O, K]``, bool."""
        return project_experts(x, self.pattern)


def check(
    weight: torch.Tensor,  # [E, O, K]
    pattern: SparsityPattern | PatternLike,
    hessian: Hessian | None,
    name: str,
) -> None:
    """Refuse what cannot be pruned; waits for the GPU once.

    Raises:
        CalibrationError: the weight is not ``[E, O, K]``, or the moments are not its own.
        PatternError: the pattern does not divide the shape.
        CheckpointError: a weight is NaN or infinite.
    """
    if weight.ndim != 3:
        raise CalibrationError(f"{name} must be [E, O, K], found {list(weight.shape)}.")
    experts, rows, k = weight.shape
    pattern.check_fits(rows, k, name)
    if hessian is not None and hessian.matrix.shape != (experts, k, k):
        raise CalibrationError(
            f"{name} needs moments [{experts}, {k}, {k}], found {list(hessian.matrix.shape)}; "
            "gate and up share moments, down has its own."
        )
    # the extremes hand on a NaN, and are much faster than isfinite() of everything
    if experts and not bool(torch.stack(weight.detach().aminmax()).isfinite().all()):
        expert, row, column = (~weight.isfinite()).nonzero()[0].tolist()
        raise CheckpointError(
            f"{name} must be finite to be pruned, found {float(weight[expert, row, column])} in "
            f"row {row} of matrix {expert}, column {column}; check the source checkpoint."
        )


def project_experts(
    x: torch.Tensor,  # [E, O, K]
    pattern: SparsityPattern | PatternLike,
) -> torch.Tensor:
    """The nearest mask of the pattern, bool, in chunks of rows so that temporaries stay small."""
    k = x.shape[-1]
    mask = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    flat_x, flat_mask = x.reshape(-1, k), mask.view(-1, k)
    step = rows_per_chunk(pattern.m, k, x.device)
    for start in range(0, flat_x.shape[0], step):
        rows = flat_x[start : start + step]
        if isinstance(pattern, SparsityPattern):
            flat_mask[start : start + step] = project(rows, pattern)
        else:
            flat_mask[start : start + step] = pattern.project(rows)
    return mask
