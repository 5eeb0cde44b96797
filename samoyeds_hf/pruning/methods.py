"""The methods by name, and :func:`prune_experts`, which runs one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

from samoyeds_hf.errors import CalibrationError
from samoyeds_hf.pattern import SparsityPattern
from samoyeds_hf.pruning.admm import admm
from samoyeds_hf.pruning.magnitude import magnitude_mask
from samoyeds_hf.pruning.memory import default_budget, experts_at_once, peak_memory
from samoyeds_hf.pruning.problem import PatternLike, Problem, check, project_experts
from samoyeds_hf.pruning.refine import refine as refine_weights
from samoyeds_hf.pruning.result import Found, Pruned, Settled, better, settle
from samoyeds_hf.pruning.sparsegpt import sparsegpt
from samoyeds_hf.pruning.wanda import wanda

if TYPE_CHECKING:
    from samoyeds_hf.pruning.moments import Hessian

__all__ = ["METHODS", "Method", "peak_memory", "prune_experts"]

Finds: TypeAlias = Callable[[Problem], Found]


@dataclass(frozen=True)
class Method:
    """A way to choose which weights stay, and what they become."""

    name: str
    needs_calibration: bool
    finds: tuple[Finds, ...]  # of several, the better for each block of rows
    always_refines: bool = False


def _magnitude(problem: Problem) -> Found:
    """Keeps what is large; the moments only measure the error."""
    return Found(_magnitude_mask(problem.dense, problem.pattern, "weight"), None, problem.notes)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("magnitude", False, (_magnitude,)),
        Method("wanda", True, (wanda,)),
        Method("sparsegpt", True, (sparsegpt,)),
        Method("admm", True, (admm,)),
        Method("best", True, (sparsegpt, admm), always_refines=True),
    )
}
"""From cheap to good."""


@torch.no_grad()
def prune_experts(
    weight: torch.Tensor,  # [E, O, K]
    pattern: SparsityPattern | PatternLike,
    hessian: Hessian | None,
    *,
    method: str,
    refine: bool = False,
    name: str = "weight",
    memory: int | None = None,
) -> Pruned:
    """Prune the weights of E experts.

    Some experts are worked on at a time, as many as fit into ``memory`` and at least one; how
    many changes nothing in the result.

    Args:
        weight: fp32, bf16 or fp16.
        pattern: what the mask becomes, exactly.
        hessian: second moments of the inputs, on the device of the weight; None only for
            ``magnitude`` without ``refine``, whose error is then that of the weight itself, H = I.
        method: a name in ``METHODS``.
        refine: least squares and local search afterwards; ``best`` always does. No block of rows
            gets worse by it.
        name: for messages.
        memory: bytes for temporaries, beside arguments and result; by default a third of the free
            GPU memory, 2 GB on a CPU.

    Raises:
        CalibrationError: no moments, or not those of this weight.
        PatternError: the pattern does not divide the shape.
        CheckpointError: a weight is NaN or infinite.
    """
    chosen = METHODS[method]
    refine = refine or chosen.always_refines
    check(weight, pattern, hessian, name)
    if hessian is None:
        if chosen.needs_calibration or refine:
            raise CalibrationError(
                f"Method {method!r}{' with refine' * refine} needs calibration data for {name}, "
                "found none; give a data set, or use method 'magnitude'."
            )
        return _without_moments(weight, pattern, name)
    experts, rows, k = weight.shape
    one, two = (
        peak_memory(
            number,
            rows,
            k,
            method,
            refine,
            element_size=hessian.matrix.element_size(),
            sub_row=1 if _keeps_all_rows(pattern) else pattern.sub_row(k),
        )
        for number in (1, 2)
    )
    budget = default_budget(weight.device) if memory is None else memory
    step = experts_at_once(experts, budget, one, two)
    found = Pruned(
        torch.empty(weight.shape, dtype=weight.dtype, device=weight.device),
        torch.empty(weight.shape, dtype=torch.bool, device=weight.device),
        torch.empty(experts, dtype=torch.float64, device=weight.device),
        (),
    )
    notes: list[tuple[str, ...]] = []
    for start in range(0, experts, step):
        part = slice(start, start + step)
        problem = Problem.of(weight[part], pattern, hessian.select(part))
        result = _prune(problem, chosen, refine).pruned(problem)
        found.weight[part], found.mask[part] = result.weight, result.mask
        found.error[part] = result.error
        notes += result.notes
        del problem, result  # before the next experts' temporaries
    return Pruned(found.weight, found.mask, found.error, tuple(notes))


def _prune(problem: Problem, method: Method, refine: bool) -> Settled:
    best: Settled | None = None
    for finds in method.finds:
        found = finds(problem)
        settled = settle(problem, found)
        if refine:
            refined = refine_weights(problem, found)
            del found
            settled = better(problem, settled, settle(problem, refined))
            del refined
        best = settled if best is None else better(problem, best, settled)
    if best is None:
        raise ValueError(f"{method.name} finds nothing")
    return best


def _keeps_all_rows(pattern: SparsityPattern | PatternLike) -> bool:
    return isinstance(pattern, SparsityPattern) and pattern.n == pattern.m


def _without_moments(
    weight: torch.Tensor,  # [E, O, K]
    pattern: SparsityPattern | PatternLike,
    name: str,
) -> Pruned:
    mask = _magnitude_mask(weight.detach(), pattern, name)
    error = []
    for own, kept in zip(weight.detach(), mask, strict=True):
        squares = own.double().square()
        total, lost = squares.sum(), squares.masked_fill_(kept, 0).sum()
        error.append(torch.where(total > 0, lost / total, 0))
    kept_weight = weight.detach().masked_fill(~mask, 0)
    return Pruned(kept_weight, mask, torch.stack(error), ((),) * len(mask))


def _magnitude_mask(
    weight: torch.Tensor,  # [E, O, K]
    pattern: SparsityPattern | PatternLike,
    name: str,
) -> torch.Tensor:
    if isinstance(pattern, SparsityPattern):
        return magnitude_mask(weight, pattern, name)
    return project_experts(weight.float(), pattern)
