"""SparseGPT: one sweep over the columns that moves the error of each into those to the right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from samoyeds_hf.pattern import GROUP, SparsityPattern
from samoyeds_hf.pruning.factor import DAMPINGS, inverse_factor
from samoyeds_hf.pruning.groups import (
    ALL_WAYS,
    block_width,
    diagonal_blocks,
    gather,
    kept_by,
    mask_of,
    outcomes,
    pair_ways,
)
from samoyeds_hf.pruning.problem import PatternLike, project_experts
from samoyeds_hf.pruning.products import add_product, fast_products
from samoyeds_hf.pruning.result import Found
from samoyeds_hf.pruning.wanda import replace_failed

if TYPE_CHECKING:
    from samoyeds_hf.pruning.problem import Problem

_DROPPED = (False,) * GROUP  # of a Sub-Row that is not kept


def sparsegpt(problem: Problem) -> Found:
    """Prune with the OBS sweep (Frantar & Alistarh 2023, algorithm 1), all experts at once.

    Groups of 4 columns are swept as one, and their 2 of 4 chosen by the exact loss of removing
    that pair: removing the columns P of a group costs ``w_P ((H^-1)_PP)^-1 w_P^T``, where H is
    that of the columns not yet swept. Sub-Rows are chosen when the sweep reaches their V-chunk,
    from what each of their weights would cost alone. Damping is relative to each H_jj, where the
    paper takes the mean.

    An expert whose H has no factor gets Wanda's result and a note.
    """
    factor, used = inverse_factor(problem.matrix)
    sweep = _Sweep(problem.weight.clone(), factor, problem.pattern)
    with fast_products(factor.device):
        sweep.run()
    notes = tuple(
        (*old, f"damping raised to {damping:g}") if damping not in (None, DAMPINGS[0]) else old
        for old, damping in zip(problem.notes, used, strict=True)
    )
    weight = sweep.current.masked_fill_(~sweep.mask | problem.dead, 0)
    failed = torch.tensor([damping is None for damping in used], device=weight.device)
    return replace_failed(problem, Found(sweep.mask, weight, notes), failed, "sparsegpt")


@dataclass
class _Sweep:
    """The state of one sweep. U is the factor of the inverse: U^T U = H^-1."""

    current: torch.Tensor  # [E, O, K]  weights, changed in place
    factor: torch.Tensor  # [E, K, K]  U
    pattern: SparsityPattern | PatternLike

    def __post_init__(self) -> None:
        self.mask = torch.zeros(self.current.shape, dtype=torch.bool, device=self.current.device)
        # [E, 1, K]  removing w_j alone now costs (w_j / U_jj)^2
        self.pivots = self.factor.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
        self.is_ours = isinstance(self.pattern, SparsityPattern)
        ways = (*pair_ways(), _DROPPED) if self.is_ours else ALL_WAYS
        self.kept = kept_by(ways, self.current.device)  # [ways, 4]
        self.table = _errors_of_removing(~self.kept, diagonal_blocks(self.factor))

    def run(self) -> None:
        k = self.current.shape[-1]
        v = self.pattern.sub_row(k)
        # Blocks divide Sub-Rows, so that all errors are in place when Sub-Rows are chosen.
        width = block_width(v)
        for start in range(0, k, width):
            if start % v == 0:
                self._choose(slice(start, start + v))
            self._sweep_block(slice(start, start + width))

    def _choose(self, chunk: slice) -> None:
        """Choose rows, or for other patterns weights, of a chunk of columns that the sweep reached.

        ``self.mask`` holds them until the block is swept.
        """
        pattern = self.pattern
        if isinstance(pattern, SparsityPattern) and pattern.n == pattern.m:
            self.mask[..., chunk] = True
            return
        score = self.current[..., chunk] / self.pivots[..., chunk]
        found = project_experts(score, pattern)
        self.mask[..., chunk] = found.any(dim=-1, keepdim=True) if self.is_ours else found

    def _sweep_block(self, columns: slice) -> None:
        """Prune some columns, then pass their errors on to all columns after them."""
        block = self.current[..., columns].mT.contiguous()  # [E, width, O]
        factor = self.factor[:, columns, columns]  # [E, width, width]
        chosen = self.mask[..., columns]
        errors = torch.empty_like(block)
        experts, width, rows = block.shape
        choices = torch.empty(experts, width // GROUP, rows, dtype=torch.int64, device=block.device)
        if not self.is_ours:  # ways are numbered by what they keep, the first column highest
            bits = torch.tensor([8, 4, 2, 1], device=block.device)
            choices.copy_((chosen.view(experts, rows, -1, GROUP) * bits).sum(dim=-1).mT)
        for number in range(width // GROUP):
            left = number * GROUP
            found = outcomes(
                self.table[:, columns.start // GROUP + number], block[:, left : left + GROUP]
            )
            choice = choices[:, number]
            if self.is_ours:
                loss = found.square().sum(dim=2)  # [E, ways, O]
                pair = loss[:, :-1].argmin(dim=1)
                choice.copy_(torch.where(chosen[..., 0], pair, len(self.kept) - 1))
            error = errors[:, left : left + GROUP] = gather(found, choice)
            row = factor[:, left : left + GROUP, left:].mT  # [E, width - left, 4]
            block[:, left:].baddbmm_(row, error, alpha=-1)
        self.current[..., columns] = block.mT
        self.mask[..., columns] = mask_of(self.kept, choices)
        rest = slice(columns.stop, None)
        add_product(self.current[..., rest], errors.mT, self.factor[:, columns, rest], alpha=-1)


def _errors_of_removing(
    removed: torch.Tensor,  # [ways, 4]  bool
    factor: torch.Tensor,  # [E, G, 4, 4]  blocks of U on the diagonal
) -> torch.Tensor:
    """Maps T ``[E, G, ways, 4, 4]`` from weights of a group to its errors, ``e = T w``.

    Removing P changes all columns by ``-U^T e`` with ``e = U_P (U_P^T U_P)^-1 w_P``, U_P the
    columns P of U, and costs ``e^T e``.
    """
    table = factor.new_zeros(*factor.shape[:2], len(removed), GROUP, GROUP)
    for way, places in enumerate(removed.tolist()):
        columns = [place for place in range(GROUP) if places[place]]
        if columns:
            some = factor[..., columns]  # [E, G, 4, P]
            inverse, _ = torch.linalg.inv_ex(some.mT @ some)
            table[..., way, :, columns] = some @ inverse
    return table
