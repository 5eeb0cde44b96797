"""How much memory pruning needs, and so how many experts are pruned at a time."""

from __future__ import annotations

import torch

CPU_BUDGET = 2 * 10**9
GPU_SHARE = 3  # one in so many of the free bytes of a GPU

_DOUBLE = 8
_PROJECTED = 1 << 24  # elements that are projected at a time on a GPU, fewer elsewhere
_PROJECTION = 32  # bytes for each of them
_BLOCK = 128  # columns, see groups.BLOCK


def peak_memory(
    experts: int,
    rows: int,
    k: int,
    method: str,
    refine: bool,
    *,
    element_size: int = 4,
    sub_row: int = _BLOCK,
) -> int:
    """Bytes of temporaries at the worst moment, beside weights, moments and result.

    An upper bound, at most about twice what is used; libraries' workspaces are not in it.

    Args:
        experts: worked on at a time.
        rows: O of a weight ``[E, O, K]``.
        k: its K.
        method: a name in ``METHODS``.
        refine: as for :func:`~samoyeds_hf.pruning.prune_experts`.
        element_size: of the moments.
        sub_row: V of the pattern, or ``_BLOCK`` where no Sub-Row is dropped.
    """
    weight, square = experts * rows * k, experts * k * k
    chunk = experts * rows * max(sub_row, _BLOCK)
    single, single_square = rows * k, k * k  # of one expert at a time
    projected = _PROJECTION * min(weight, _PROJECTED)
    # Elements of the moments' dtype, which a dense weight is taken to be as large as, then bytes.
    project = weight + projected
    settle = (2 * weight + 3 * single) * element_size + 2 * weight
    sweep = (weight + square + 4 * chunk) * element_size + 3 * weight
    sweep += max(5 * single_square * _DOUBLE, _PROJECTION * min(chunk, _PROJECTED))
    search = (3 * weight + square) * element_size + 3 * weight
    search += max(5 * single_square * element_size, projected)
    solve = 6 * weight * element_size + 4 * weight
    swap = (4 * weight + 5 * chunk) * element_size + 4 * weight + 6 * chunk
    stages = {
        "magnitude": [project],
        "wanda": [project],
        "sparsegpt": [sweep],
        "admm": [search],
        "best": [sweep, search],
    }[method]
    found = weight * (element_size + 1)  # scaled weights and masks that were found
    stages = [*stages, found + settle]
    if refine or method == "best":
        stages += [found + solve, found + swap]
    kept = found if method == "best" else 0  # the other candidate
    return (weight + square) * element_size + max(stages) + kept


def experts_at_once(experts: int, budget: int, one: int, two: int) -> int:
    """How many experts to take at a time, at least one, in chunks of nearly equal size.

    Args:
        experts: in all.
        budget: bytes.
        one: bytes that a single expert needs.
        two: bytes that two together need.
    """
    fit = min(experts, max(1, 1 + (budget - one) // max(1, two - one)))
    return -(-experts // -(-experts // fit))


def default_budget(device: torch.device) -> int:
    """Bytes for temporaries on a device."""
    if device.type != "cuda":
        return CPU_BUDGET
    free, _ = torch.cuda.mem_get_info(device)
    # what the allocator holds without use is free too
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (free + cached) // GPU_SHARE
