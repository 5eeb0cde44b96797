"""Groups of 4 columns and the ways to keep some of them, worked on as one.

A sweep takes a group at a time. All that could become of it is linear in it: a table holds one
4 x 4 matrix for each way, a small product gives every outcome, and the best is gathered. Columns
lie in the middle dimension, ``[E, columns, O]``, so that a group is contiguous rows.
"""

from __future__ import annotations

import itertools

import torch

from samoyeds_hf.pattern import GROUP, KEPT_PER_GROUP

BLOCK = 128  # columns whose effect on the rest is gathered into one product

PAIRS = tuple(itertools.combinations(range(GROUP), KEPT_PER_GROUP))  # what 2:4 may keep
ALL_WAYS = tuple(itertools.product((False, True), repeat=GROUP))  # what anything may keep


def diagonal_blocks(matrix: torch.Tensor) -> torch.Tensor:
    """The 4 x 4 blocks on the diagonal of ``[E, K, K]``: ``[E, K/4, 4, 4]``."""
    experts, k = matrix.shape[:2]
    blocks = matrix.view(experts, k // GROUP, GROUP, k // GROUP, GROUP)
    return blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()


def kept_by(ways: tuple[tuple[bool, ...], ...], device: torch.device) -> torch.Tensor:
    """Which of the 4 each way keeps, ``[ways, 4]`` bool."""
    return torch.tensor(ways, dtype=torch.bool, device=device)


def pair_ways() -> tuple[tuple[bool, ...], ...]:
    """The six ways of 2:4."""
    return tuple(tuple(place in pair for place in range(GROUP)) for pair in PAIRS)


def outcomes(
    table: torch.Tensor,  # [E, ways, 4, 4]  of one group
    group: torch.Tensor,  # [E, 4, O]
) -> torch.Tensor:
    """What becomes of the group in each way, ``[E, ways, 4, O]``."""
    experts, ways = table.shape[:2]
    found = torch.bmm(table.reshape(experts, ways * GROUP, GROUP), group)
    return found.view(experts, ways, GROUP, group.shape[-1])


def gather(
    found: torch.Tensor,  # [E, ways, 4, O]
    choice: torch.Tensor,  # [E, O]  a way for each row
) -> torch.Tensor:
    """What becomes of the group in the way chosen, ``[E, 4, O]``."""
    index = choice[:, None, None, :].expand(-1, 1, GROUP, -1)
    return found.gather(1, index).squeeze(1)


def mask_of(
    kept: torch.Tensor,  # [ways, 4]  bool
    choices: torch.Tensor,  # [E, groups, O]  a way for each group and row
) -> torch.Tensor:
    """Kept columns as a mask ``[E, O, 4 * groups]``."""
    return kept[choices].permute(0, 2, 1, 3).flatten(2)


def block_width(v: int) -> int:
    """The widest block of whole groups, at most ``BLOCK`` columns, that divides v."""
    return max(width for width in range(GROUP, min(v, BLOCK) + 1, GROUP) if v % width == 0)
