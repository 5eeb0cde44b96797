"""Local search over masks: every choice once more, with all other weights as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from samoyeds_hf.pattern import GROUP, SparsityPattern
from samoyeds_hf.pruning.groups import (
    block_width,
    diagonal_blocks,
    gather,
    kept_by,
    mask_of,
    outcomes,
    pair_ways,
)
from samoyeds_hf.pruning.products import add_product, fast_products, multiply

if TYPE_CHECKING:
    from samoyeds_hf.pruning.problem import Problem

PASSES = 2  # over the groups of a Sub-Row, before Sub-Rows are compared
_RIDGE = 1e-5  # of the unit diagonal: two inputs may be copies of each other


def swap(
    problem: Problem,
    pattern: SparsityPattern,
    weight: torch.Tensor,  # [E, O, K]  scaled Q, changed in place
    mask: torch.Tensor,  # [E, O, K]  changed in place
) -> None:
    """One pass over all Sub-Rows; each step lowers the loss or leaves it.

    A step takes a V-chunk of all rows, kept or not, and gives each of its groups the best pair
    and weights (the minimum of a quadratic in 2 of 4 variables, compared over the six pairs).
    What keeping the Sub-Row saves is then known for all M rows of a block, and the N that save
    most stay. Coordinate descent in the manner of Optimal Brain Damage with exact steps; it finds
    better Sub-Rows than any method here chooses by itself, most of all at large V.
    """
    k = weight.shape[-1]
    drops_rows = pattern.n < pattern.m
    width = pattern.sub_row(k) if drops_rows else block_width(pattern.sub_row(k))
    blocks = diagonal_blocks(problem.matrix)  # [E, K/4, 4, 4]
    kept = kept_by(pair_ways(), weight.device)
    table = _best_weights(kept, blocks)
    residual = multiply(problem.weight - weight, problem.matrix)  # [E, O, K]  (W - Q) H
    with fast_products(weight.device):
        for start in range(0, k, width):
            chunk = slice(start, start + width)
            groups = slice(start // GROUP, (start + width) // GROUP)
            before = weight[..., chunk].mT.contiguous()  # [E, V, O]
            after, choices, rest = _descend(
                before,
                residual[..., chunk].mT.contiguous(),
                problem.matrix[:, chunk, chunk],
                blocks[:, groups],
                table[:, groups],
            )
            found = mask_of(kept, choices)
            if drops_rows:
                # (r + x H) . x, twice less x H x: what the loss falls by when x comes to 0
                saved = multiply(problem.matrix[:, chunk, chunk], after)
                saved = saved.add_(rest, alpha=2).mul_(after).sum(dim=1)  # [E, O]
                stays = _most(saved, pattern)
                after.mul_(stays.unsqueeze(1))
                found &= stays.unsqueeze(-1)
            mask[..., chunk] = found
            weight[..., chunk] = after.mT
            change = after.sub_(before).mT  # [E, O, V]
            add_product(residual, change, problem.matrix[:, chunk], alpha=-1)


def _descend(
    before: torch.Tensor,  # [E, V, O]  weights of a chunk
    residual: torch.Tensor,  # [E, V, O]  changed in place
    matrix: torch.Tensor,  # [E, V, V]
    blocks: torch.Tensor,  # [E, V/4, 4, 4]  of the matrix on its diagonal
    table: torch.Tensor,  # [E, V/4, ways, 4, 4]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights of all rows of a chunk in 2:4, ``[E, V, O]``, the pairs kept, and the residual."""
    after = before.clone()
    experts, width, rows = after.shape
    choices = torch.empty(experts, width // GROUP, rows, dtype=torch.int64, device=after.device)
    for _ in range(PASSES):
        for number in range(width // GROUP):
            group = slice(number * GROUP, (number + 1) * GROUP)
            # what the residual would be without the group
            linear = torch.baddbmm(residual[:, group], blocks[:, number], after[:, group])
            found = outcomes(table[:, number], linear)  # [E, ways, 4, O]
            choice = (found * linear.unsqueeze(1)).sum(dim=2).argmax(dim=1)
            choices[:, number] = choice
            new = gather(found, choice)
            residual.baddbmm_(matrix[:, :, group], new - after[:, group], alpha=-1)
            after[:, group] = new
    return after, choices, residual


def _best_weights(
    kept: torch.Tensor,  # [ways, 4]  bool
    blocks: torch.Tensor,  # [E, G, 4, 4]
) -> torch.Tensor:
    """Maps ``[E, G, ways, 4, 4]`` from linear terms b of a group to its best weights in each way.

    Keeping P, the minimum of ``x H x^T - 2 b x^T`` is at ``x_P = b_P (H_PP)^-1``, worth ``x b^T``.
    """
    table = blocks.new_zeros(*blocks.shape[:2], len(kept), GROUP, GROUP)
    for way, places in enumerate(kept.tolist()):
        pair = [place for place in range(GROUP) if places[place]]
        some = blocks[..., pair, :][..., pair]  # [E, G, 2, 2]
        some.diagonal(dim1=-2, dim2=-1).add_(_RIDGE)
        inverse, _ = torch.linalg.inv_ex(some)
        for i, row in enumerate(pair):
            for j, column in enumerate(pair):
                table[..., way, row, column] = inverse[..., i, j]
    return table


def _most(saved: torch.Tensor, pattern: SparsityPattern) -> torch.Tensor:
    """The N of each M rows that save most, bool ``[E, O]``; of equals the earlier."""
    blocks = saved.view(saved.shape[0], -1, pattern.m)
    order = blocks.sort(dim=-1, descending=True, stable=True).indices[..., : pattern.n]
    stays = torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, order, True)
    return stays.view(saved.shape)
