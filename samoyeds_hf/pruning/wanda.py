"""Wanda: keep what is large times the norm of its input. No weight changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from samoyeds_hf.pruning.result import Found

if TYPE_CHECKING:
    from samoyeds_hf.pruning.problem import Problem


def wanda(problem: Problem) -> Found:
    """Prune by ``|W_ij| * sqrt(H_jj)`` (Sun et al. 2023, eq. 1), compared within the pattern."""
    return Found(problem.project(problem.weight), None, problem.notes)


def replace_failed(
    problem: Problem,
    found: Found,  # with weights
    failed: torch.Tensor,  # [E]  bool: could not be factored
    method: str,
) -> Found:
    """Wanda, and a note, for experts whose moments have no factor or whose weights are not finite.

    Waits for the GPU once.
    """
    if found.weight is None:
        return found
    finite = torch.stack([own.sum().isfinite() for own in found.weight])  # a sum hands on NaN
    states = torch.stack((failed, ~finite)).tolist()
    if not any(map(any, states)):
        return found
    fallback, reasons = wanda(problem), ("could not factor the moments", "gave no finite weights")
    mask, weight, notes = found.mask.clone(), found.weight.clone(), list(found.notes)
    for expert, state in enumerate(zip(*states, strict=True)):
        if any(state):
            mask[expert] = fallback.mask[expert]
            weight[expert] = problem.weight[expert].masked_fill(~mask[expert], 0)
            reason = reasons[state.index(True)]
            notes[expert] += (f"{method} {reason}: pruned by wanda instead",)
    return Found(mask, weight, tuple(notes))
